"""From rewards to advantages or weights: by prompt (DDPO, appendix F.3), by group (GRPO), by batch. All in NumPy."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from diffusion_gym.agents.finite import Options, require, require_choice

Floats = NDArray[np.float64]
Normalization = Literal["prompt", "batch", "group", "none"]
Deviation = Literal["own", "batch", "none"]


class NoUsableReward(RuntimeError):
    """Every reward of an iteration was NaN or infinite: there is nothing to learn from."""


def usable_rewards(rewards: Floats) -> NDArray[np.int64]:
    """Indices of the rewards that are finite.

    Raises:
        NoUsableReward: there is none.
    """
    usable = np.flatnonzero(np.isfinite(rewards))
    if len(usable) == 0:
        raise NoUsableReward(f"all {len(rewards)} rewards of the iteration are NaN or infinite; check the reward")
    return usable


@dataclass(frozen=True)
class AdvantageOptions(Options):
    """How rewards become advantages; the defaults are those of the DDPO paper, appendix F.3."""

    normalization: Normalization = "prompt"
    """What rewards are normalised by to give advantages: each prompt's running statistics, the batch, the group of
    samples that share a prompt (GRPO), or nothing."""
    group_size: int = 1
    """Samples in a row that share a prompt; with `normalization=group`, the group."""
    reward_deviation: Deviation = "own"
    """What rewards, less the mean of their group or prompt, are divided by: its own standard deviation; the batch's, so
    that groups of clear differences count more (Flow-GRPO); or nothing."""
    component_weights: tuple[str, ...] = ()
    """Components of the reward, each NAME=WEIGHT, to normalise on their own before they are summed up (GDPO), in place
    of the reward; the sum is normalised by the batch. With `normalization` group or batch."""
    skip_equal_groups: bool = False
    """Leave groups out whose rewards are all equal, unless all groups are such; with `normalization=group`. Their
    advantages are 0, so that but for a KL term they teach nothing."""
    statistics_buffer: int = 32
    """Rewards kept a prompt for its running statistics."""
    statistics_min_count: int = 16
    """Rewards a prompt needs before its own statistics are used; until then the batch's are."""
    advantage_clip: float = 5.0
    """Advantages are clipped to +- this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "larger than 0", "advantage_clip", "group_size")
        require_choice(self, "normalization", Normalization)
        require_choice(self, "reward_deviation", Deviation)
        if self.normalization == "group" and self.group_size < 2:
            raise ValueError(f"normalization='group' needs group_size={self.group_size!r} to be at least 2")
        if self.weights_of_components() and self.normalization not in ("group", "batch"):
            raise ValueError(
                f"component_weights={self.component_weights!r} goes with normalization='group' or 'batch', not "
                f"{self.normalization!r}"
            )

    def weights_of_components(self) -> dict[str, float]:
        """The weights by name of component.

        Raises:
            ValueError: `component_weights` has an entry that is not NAME=WEIGHT.
        """
        weights = {}
        for entry in self.component_weights:
            name, _, weight = entry.rpartition("=")
            try:
                weights[name] = float(weight)
            except ValueError:
                weights[name] = float("nan")
            if not name or not np.isfinite(weights[name]):
                raise ValueError(f"component_weights={entry!r} must be NAME=WEIGHT, such as Aesthetic=0.5")
        return weights


def batch_normalize(rewards: Floats, std_floor: float = 1e-6) -> Floats:
    """Rewards `(N,)` to zero mean and unit standard deviation over the batch."""
    return (rewards - rewards.mean()) / max(float(rewards.std()), std_floor)


def group_normalize(rewards: Floats, group_size: int, std_floor: float = 1e-6, deviation: Deviation = "own") -> Floats:
    """Rewards `(N,)` to zero mean and unit deviation within each run of `group_size` (GRPO, arXiv:2402.03300).

    Rewards that are not finite stay so and do not count in their group.

    Args:
        rewards: `(N,)`.
        group_size: samples of a group.
        std_floor: floor of the standard deviation.
        deviation: `own` divides by the group's, `batch` by that of all (Flow-GRPO), `none` not at all.
    """
    groups = np.where(np.isfinite(rewards), rewards, np.nan).reshape(-1, group_size)
    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a group without any finite reward
        mean = np.nanmean(groups, 1, keepdims=True)
        std = np.nanstd(groups, 1, keepdims=True) if deviation == "own" else np.nanstd(groups)
    return ((groups - mean) / (1.0 if deviation == "none" else np.maximum(std, std_floor))).reshape(-1)


def equal_groups(rewards: Floats, group_size: int) -> NDArray[np.bool_]:
    """For each sample, whether the finite rewards of its run of `group_size` are all equal: `(N,)`."""
    groups = rewards.reshape(-1, group_size)
    finite = np.isfinite(groups)
    highest = np.where(finite, groups, -np.inf).max(1)
    lowest = np.where(finite, groups, np.inf).min(1)
    return np.repeat(highest <= lowest, group_size)


def best_and_worst(rewards: Floats, group_size: int) -> Floats:
    """1 for the best of each run of `group_size` rewards, -1 for the worst, NaN for the others: `(N,)`.

    A group whose rewards are all equal prefers nothing: NaN, or 0 for all where no group prefers anything. Rewards that
    are not finite do not count.
    """
    chosen = np.full(len(rewards), np.nan)
    groups = np.arange(len(rewards)).reshape(-1, group_size)
    for rows in (group[np.isfinite(rewards[group])] for group in groups):
        if len(rows) and rewards[rows].max() > rewards[rows].min():
            chosen[rows[rewards[rows].argmax()]], chosen[rows[rewards[rows].argmin()]] = 1.0, -1.0
    return chosen if np.isfinite(chosen).any() else np.where(np.isfinite(rewards), 0.0, np.nan)


def softmax_weights(prompts: Sequence[str], rewards: Floats, beta: float) -> Floats:
    """RWR's weights `(N,)`, softmax(beta r) over the samples of each prompt (DDPO, sections C.2 and F.2).

    Rewards that are not finite get weight 0.
    """
    weights = np.zeros(len(rewards))
    for rows in _by_prompt(prompts, rewards):
        scaled = beta * (rewards[rows] - rewards[rows].max())
        weights[rows] = np.exp(scaled) / np.exp(scaled).sum()
    return weights


def threshold_weights(prompts: Sequence[str], rewards: Floats, percentile: float) -> Floats:
    """Sparse RWR's weights `(N,)`: 1 where a reward reaches its prompt's `percentile` quantile, else 0.

    Rewards that are not finite get weight 0 (DDPO, sections C.2 and F.2).
    """
    weights = np.zeros(len(rewards))
    for rows in _by_prompt(prompts, rewards):
        weights[rows] = rewards[rows] >= np.quantile(rewards[rows], percentile)
    return weights


def usable_counts(prompts: Sequence[str], rewards: Floats) -> NDArray[np.int64]:
    """For each sample, how many finite rewards its prompt has: `(N,)`; 0 where its own is not finite."""
    counts = np.zeros(len(rewards), dtype=np.int64)
    for rows in _by_prompt(prompts, rewards):
        counts[rows] = len(rows)
    return counts


def _by_prompt(prompts: Sequence[str], rewards: Floats) -> Iterator[NDArray[np.int64]]:
    """Indices of the finite rewards, prompt by prompt."""
    usable = np.flatnonzero(np.isfinite(rewards))
    yield from (usable[rows] for rows in rows_by_prompt([prompts[index] for index in usable.tolist()]).values())


def rows_by_prompt(prompts: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    """Where each distinct prompt stands among N, in the order of their first places; in one pass."""
    rows: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(index)
    return {prompt: np.array(found) for prompt, found in rows.items()}


class PromptStatistics:
    """Running mean and standard deviation of the reward, for each prompt on its own.

    A prompt with fewer than `min_count` rewards in its buffer is normalised by the batch instead.

    Args:
        buffer_size: rewards kept a prompt.
        min_count: rewards needed before a prompt's own statistics are used.
        std_floor: floor of the standard deviation, so that equal rewards give 0 and not NaN.

    Raises:
        ValueError: `min_count` is larger than `buffer_size`, so that it could never be reached.
    """

    def __init__(
        self,
        buffer_size: int = AdvantageOptions.statistics_buffer,
        min_count: int = AdvantageOptions.statistics_min_count,
        std_floor: float = 1e-6,
    ) -> None:
        if not 1 <= min_count <= buffer_size:
            raise ValueError(f"min_count={min_count} must lie between 1 and buffer_size={buffer_size}")
        self.buffer_size, self.min_count, self.std_floor = buffer_size, min_count, std_floor
        self._rewards: dict[str, deque[float]] = {}

    def normalize(self, prompts: Sequence[str], rewards: Floats, deviation: Deviation = "own") -> Floats:
        """Take `rewards` `(N,)` into the statistics and return the advantages `(N,)`.

        Args:
            prompts: of the rewards.
            rewards: finite.
            deviation: what the distance from a prompt's mean is divided by; see `AdvantageOptions`.
        """
        for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
            self._rewards.setdefault(prompt, deque(maxlen=self.buffer_size)).append(reward)
        mean, std = rewards.mean(), rewards.std()
        advantages = np.full(len(rewards), np.nan)
        for rows in _by_prompt(prompts, rewards):
            buffer = np.array(self._rewards[prompts[int(rows[0])]])
            centre, spread = (mean, std) if len(buffer) < self.min_count else (buffer.mean(), buffer.std())
            spread = {"own": spread, "batch": std, "none": 1.0}[deviation]
            advantages[rows] = (rewards[rows] - centre) / max(float(spread), self.std_floor)
        return advantages

    def state(self) -> dict[str, list[float]]:
        """The buffers, for a checkpoint."""
        return {prompt: list(rewards) for prompt, rewards in self._rewards.items()}

    def load(self, state: Mapping[str, Sequence[float]]) -> None:
        """Put back what `state` gave."""
        self._rewards = {prompt: deque(rewards, maxlen=self.buffer_size) for prompt, rewards in state.items()}


class RewardNormalizer:
    """Makes advantages of the rewards of one iteration after another.

    Args:
        options: how.

    Attributes:
        statistics: of the prompts; part of a checkpoint.
        equal_share: share of the last rewards' groups whose rewards are all equal.

    Raises:
        ValueError: `statistics_min_count` is larger than `statistics_buffer`.
    """

    def __init__(self, options: AdvantageOptions) -> None:
        self.options, self.equal_share = options, 0.0
        self.statistics = PromptStatistics(options.statistics_buffer, options.statistics_min_count)

    def normalize(
        self, prompts: Sequence[str], rewards: Floats, components: Mapping[str, Floats] | None = None
    ) -> Floats:
        """Normalised rewards `(N,)` of N samples with their prompts; NaN where a reward is not finite.

        Args:
            prompts: of the samples.
            rewards: `(N,)`.
            components: those that `component_weights` names, each `(N,)`.

        Raises:
            NoUsableReward: no reward is finite.
            ValueError: the components are not at hand.
        """
        usable, options = usable_rewards(rewards), self.options
        if weights := options.weights_of_components():
            if components is None:
                raise ValueError(
                    f"component_weights={options.component_weights!r} needs the reward's components, which a library's "
                    "rollouts do not keep; leave it out, or take a native agent"
                )
            parts = [weight * self._normalized(prompts, components[name]) for name, weight in weights.items()]
            total = np.sum(parts, axis=0)
            normalized = np.full(len(rewards), np.nan)
            finite = np.isfinite(total) & np.isfinite(rewards)
            normalized[finite] = batch_normalize(total[finite]) if finite.any() else 0.0
        else:
            normalized = self._normalized(prompts, rewards)
        if options.normalization == "group":
            equal = equal_groups(rewards, options.group_size)
            self.equal_share = float(equal[:: options.group_size].mean())
            if options.skip_equal_groups and not equal[usable].all():
                normalized = np.where(equal, np.nan, normalized)
        return normalized

    def _normalized(self, prompts: Sequence[str], rewards: Floats) -> Floats:
        """One kind of rewards, as `normalization` and `reward_deviation` say; NaN where one is not finite."""
        options, usable = self.options, np.flatnonzero(np.isfinite(rewards))
        if options.normalization == "group":
            return group_normalize(rewards, options.group_size, deviation=options.reward_deviation)
        finite, normalized = rewards[usable], np.full(len(rewards), np.nan)
        if options.normalization == "prompt":
            own = [prompts[index] for index in usable.tolist()]
            finite = self.statistics.normalize(own, finite, options.reward_deviation)
        elif options.normalization == "batch":
            finite = batch_normalize(finite)
        normalized[usable] = finite
        return normalized

    def clip(self, advantages: Floats) -> Floats:
        """Advantages within +- `advantage_clip`."""
        return np.clip(advantages, -self.options.advantage_clip, self.options.advantage_clip)
