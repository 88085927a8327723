"""Statistics of a matrix of runs, after Agarwal et al. (arXiv:2108.13264).

The scores of an agent are one array a task, an entry a seed. Intervals are 95 % percentile bootstraps, stratified: the
seeds are drawn anew within each task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Scores = Sequence[NDArray[np.float64]]

RESAMPLES: Final = 5_000
_TRIMMED: Final = 0.25  # of either end: what is left is the middle half
_FLIPS: Final = 2**16  # draws of signs; all of them where there are no more, as for five seeds of three tasks


@dataclass(frozen=True)
class Estimate:
    """A statistic and its 95 % interval; the ends are NaN where there are too few seeds to tell.

    A bootstrap draws from the scores that are there. Of four runs, three of which have the same score, so many draws
    have that score for their interquartile mean that the interval ends at the estimate itself: 0.054 of (0.054, 0.054,
    0.054, 0.096) has the interval 0.054 to 0.096. Such an interval says that the scores are few and tied, not that
    nothing below is possible; `sign_flip_p` of the four is 0.125.

    Attributes:
        value: the statistic of all seeds.
        low: lower end.
        high: upper end.
    """

    value: float
    low: float
    high: float

    def above(self, bound: float) -> bool:
        """Whether the whole interval lies above `bound`: only then is something called better."""
        return self.low > bound

    def below(self, bound: float) -> bool:
        """Whether the whole interval lies below `bound`."""
        return self.high < bound

    @property
    def at_an_end(self) -> bool:
        """Whether the statistic is an end of its interval, as in tied scores of few seeds: see above."""
        ends = (math.isclose(self.value, end, rel_tol=1e-9) for end in (self.low, self.high))
        return self.low < self.high and any(ends)


def interquartile_mean(scores: Scores) -> Estimate:
    """Mean of the middle half of the scores of all tasks and seeds.

    Args:
        scores: an array a task, an entry a seed.
    """
    return _bootstrapped(scores, _iqm)


def mean(scores: Scores) -> Estimate:
    """Mean of the scores of all tasks and seeds."""
    return _bootstrapped(scores, lambda *parts, axis: np.concatenate(parts, axis=axis).mean(axis=axis))


def paired_difference(first: Scores, second: Scores) -> Estimate:
    """Interquartile mean of the differences first - second, seed by seed: the seeds share their noise.

    Raises:
        ValueError: the two have not the same seeds.
    """
    if [len(part) for part in first] != [len(part) for part in second]:
        raise ValueError(
            "scores of the two agents must be of the same tasks and seeds; leave out those that only one has"
        )
    return interquartile_mean([a - b for a, b in zip(first, second, strict=True)])


def probability_of_improvement(first: Scores, second: Scores) -> Estimate:
    """Probability that a run of the first agent scores above one of the second, mean over tasks; ties are half.

    Args:
        first: an array a task, an entry a seed.
        second: the same tasks; other numbers of seeds are allowed.
    """
    tasks = len(first)

    def statistic(*parts: NDArray[np.float64], axis: int) -> Any:
        shares = [_share_above(parts[task], parts[tasks + task]) for task in range(tasks)]
        return np.mean(shares, axis=0)

    return _bootstrapped([*first, *second], statistic)


def sign_flip_p(differences: Scores) -> float:
    """Two-sided p of the mean of paired differences, by the signs that they might as well have had.

    Fisher's permutation test: exact, and so also for few seeds, where a bootstrap's interval is too narrow. All of
    five seeds on one task may agree, and p is 2 / 2^5.

    Args:
        differences: an array a task, an entry a seed.
    """
    from scipy import stats

    values = np.concatenate(list(differences))
    if len(values) < 2:
        return 1.0

    def statistic(drawn: NDArray[np.float64], axis: int) -> Any:
        return drawn.mean(axis=axis)

    options: dict[str, Any] = {"permutation_type": "samples", "vectorized": True, "n_resamples": _FLIPS, "rng": 0}
    return float(stats.permutation_test((values,), statistic, **options).pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """P values adjusted for the number of comparisons (Holm 1979): below 0.05, hardly one of all is a false alarm."""
    adjusted, largest = list(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=lambda index: p[index])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = largest
    return adjusted


def performance_profile(scores: Scores, thresholds: NDArray[np.float64]) -> list[Estimate]:
    """Share of the runs that score above each threshold, every task counting the same."""
    return [_bootstrapped(scores, _share_over(float(threshold))) for threshold in thresholds]


def _share_over(threshold: float) -> Callable[..., Any]:
    def statistic(*parts: NDArray[np.float64], axis: int) -> Any:
        return np.mean([(part > threshold).mean(axis=axis) for part in parts], axis=0)

    return statistic


def _share_above(first: NDArray[np.float64], second: NDArray[np.float64]) -> Any:
    difference = first[..., :, None] - second[..., None, :]
    return (0.5 * (np.sign(difference) + 1)).mean(axis=(-2, -1))


def _iqm(*parts: NDArray[np.float64], axis: int) -> Any:
    from scipy import stats

    return stats.trim_mean(np.concatenate(parts, axis=axis), _TRIMMED, axis=axis)


def _bootstrapped(parts: Scores, statistic: Callable[..., Any]) -> Estimate:
    from scipy import stats

    value = float(statistic(*parts, axis=-1))
    if any(len(part) < 2 for part in parts):
        return Estimate(value, float("nan"), float("nan"))
    interval = stats.bootstrap(
        tuple(parts), statistic, n_resamples=RESAMPLES, vectorized=True, axis=-1, method="percentile", rng=0
    ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high))
