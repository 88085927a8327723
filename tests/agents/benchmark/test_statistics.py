"""Statistics of a matrix of runs, against SciPy's other functions, hand-computed values and the normal distribution."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from diffusion_gym.agents.benchmark.statistics import (
    Estimate,
    interquartile_mean,
    mean,
    paired_difference,
    performance_profile,
    probability_of_improvement,
    sign_flip_p,
)


def normal(seeds, tasks, shift=0.0, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(shift + task, 1.0, seeds) for task in range(tasks)]


def test_interquartile_mean_leaves_out_both_ends():
    scores = [np.array([-1000.0, 1.0, 2.0, 3.0]), np.array([4.0, 5.0, 6.0, 1000.0])]
    assert interquartile_mean(scores).value == (2 + 3 + 4 + 5) / 4


def test_interval_of_a_mean_is_that_of_the_normal_distribution():
    draws = np.random.default_rng(1).normal(3.0, 2.0, 400)
    found, error = mean([draws]), stats.sem(draws)
    assert found.value == pytest.approx(draws.mean())
    assert found.low == pytest.approx(draws.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(draws.mean() + 1.96 * error, abs=0.1 * error)


def test_seeds_are_drawn_within_their_task():
    """Drawn over all tasks at once, the distance between the tasks would widen the interval."""
    scores = [np.array([0.0, 0.1, 0.2]), np.array([100.0, 100.1, 100.2])]
    found = mean(scores)
    assert found.value == pytest.approx(50.1)
    assert found.high - found.low < 0.2


def test_paired_differences_cancel_what_the_seeds_share():
    shared = np.random.default_rng(2).normal(0.0, 10.0, 6)
    first, second = [shared + 0.5], [shared + np.array([0.0, 0.1, -0.1, 0.05, -0.05, 0.0])]
    assert paired_difference(first, second).above(0.0)
    assert paired_difference(second, first).below(0.0)
    assert not probability_of_improvement(first, second).above(0.5)


def test_paired_difference_refuses_other_seeds():
    with pytest.raises(ValueError, match="same tasks and seeds"):
        paired_difference([np.zeros(3)], [np.zeros(4)])


def test_probability_of_improvement_is_the_mann_whitney_statistic():
    first, second = normal(5, 3, 0.4, seed=3), normal(7, 3, seed=4)
    expected = np.mean([stats.mannwhitneyu(a, b).statistic / (5 * 7) for a, b in zip(first, second, strict=True)])
    found = probability_of_improvement(first, second)
    assert found.value == pytest.approx(expected)
    assert found.low <= found.value <= found.high
    assert probability_of_improvement(second, first).value == pytest.approx(1 - expected)


def test_ties_are_half():
    assert probability_of_improvement([np.ones(3)], [np.ones(3)]) == Estimate(0.5, 0.5, 0.5)


def test_performance_profile_counts_the_runs_above_each_threshold():
    scores = [np.array([0.1, 0.5, 0.9, 1.0]), np.array([0.2, 0.2, 0.2, 0.6])]
    found = performance_profile(scores, np.array([0.0, 0.2, 0.55, 1.0]))
    assert [entry.value for entry in found] == [1.0, (3 / 4 + 1 / 4) / 2, (2 / 4 + 1 / 4) / 2, 0.0]
    assert found[0] == Estimate(1.0, 1.0, 1.0)


def test_one_seed_tells_nothing_of_the_interval():
    found = interquartile_mean([np.array([1.0]), np.array([2.0])])
    assert found.value == 1.5 and math.isnan(found.low) and math.isnan(found.high)
    assert not found.above(0.0) and not found.below(10.0)


def test_the_same_scores_give_the_same_interval():
    scores = normal(5, 4)
    assert interquartile_mean(scores) == interquartile_mean(scores)


@pytest.mark.parametrize("scores", [[[0.054, 0.054, 0.054, 0.096]], [[0.054, 0.054], [0.054, 0.138]]])
def test_tied_scores_of_few_seeds_have_an_interval_that_ends_at_its_estimate(scores):
    """All resamples written out: more than 2.5 % of them have the smallest score for their interquartile mean."""
    parts = [np.array(part) for part in scores]
    draws = itertools.product(*[itertools.product(part, repeat=len(part)) for part in parts])
    means = np.sort([np.sort(np.concatenate(drawn))[1:3].mean() for drawn in draws])
    assert means[int(0.025 * len(means))] == pytest.approx(0.054)
    found = interquartile_mean(parts)
    assert (found.value, found.low, found.high) == pytest.approx((0.054, 0.054, 0.096)) and found.at_an_end
    assert sign_flip_p(parts) == 2 / 2**4  # undecided, whatever the interval says
    assert not interquartile_mean([np.array([0.0, 0.1, 0.2, 0.4])]).at_an_end
    assert not interquartile_mean([np.ones(3)]).at_an_end and not interquartile_mean([np.ones(1)]).at_an_end


def test_fifteen_pairs_are_exact():
    """Five seeds of three tasks: every choice of signs, in place of draws that leave a p near 0.05 to chance."""
    values = np.random.default_rng(0).normal(0.3, 1.0, 15)
    signs = np.array(list(itertools.product((-1, 1), repeat=15)))
    expected = (np.abs(signs @ values) >= np.abs(values.sum()) - 1e-9).mean()
    assert 1e-3 < expected < 1
    assert sign_flip_p(np.split(values, 3)) == pytest.approx(expected, abs=1e-12)
