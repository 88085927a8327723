"""Weights of reward-weighted regression against SciPy and NumPy."""

import warnings

import numpy as np
import pytest
from scipy.special import softmax

from diffusion_gym.agents.advantages import softmax_weights, threshold_weights

NAN, INF = float("nan"), float("inf")
PROMPTS = ("a", "b", "a", "c", "b", "a", "a", "b")
REWARDS = np.array([1.0, -3.0, 7.0, 2.0, 4.5, -20.0, 7.5, 4.5])


@pytest.mark.parametrize("beta", [0.2, 1.0, 0.0])
def test_rwr_weights_are_a_softmax_for_each_prompt(beta):
    expected = np.empty(len(REWARDS))
    for prompt in set(PROMPTS):
        own = [index for index, name in enumerate(PROMPTS) if name == prompt]
        expected[own] = softmax(beta * REWARDS[own])
    found = softmax_weights(PROMPTS, REWARDS, beta)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    for prompt in set(PROMPTS):
        assert sum(w for w, name in zip(found, PROMPTS, strict=True) if name == prompt) == pytest.approx(1)
    np.testing.assert_allclose(softmax_weights(PROMPTS, REWARDS + 1e4, beta), found, rtol=1e-9)


def test_rwr_weights_of_huge_rewards_do_not_overflow():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert softmax_weights(["a"] * 3, np.array([3e38, -3e38, 1.0]), 0.2).tolist() == [1, 0, 0]
        assert softmax_weights(["a"] * 2, np.array([-3e38, -3e38]), 0.2).tolist() == [0.5, 0.5]


def test_sparse_weights_are_a_quantile_for_each_prompt():
    rng = np.random.default_rng(0)
    prompts = [str(name) for name in rng.integers(0, 4, 300)]
    rewards = rng.normal(size=300) + 10 * np.array([int(name) for name in prompts])
    for percentile in (0.9, 0.5, 0.0):
        found = threshold_weights(prompts, rewards, percentile)
        assert set(found) <= {0.0, 1.0}
        for prompt in set(prompts):
            own = np.array([name == prompt for name in prompts])
            np.testing.assert_array_equal(found[own], rewards[own] >= np.quantile(rewards[own], percentile))
            assert found[own].mean() == pytest.approx(1 - percentile, abs=1 / own.sum())


@pytest.mark.parametrize(
    "rewards, expected",
    [
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [0] * 9 + [1, 1]),  # the 0.9 quantile of eleven is the tenth
        ([0] * 8 + [5, 5, 5], [0] * 8 + [1, 1, 1]),  # ties at the threshold all count
        ([3.7] * 11, [1] * 11),
        ([4], [1]),
        ([1, NAN, 2, INF, -INF], [0, 0, 1, 0, 0]),
    ],
)
def test_sparse_weights_by_hand(rewards, expected):
    assert threshold_weights(["a"] * len(rewards), np.array(rewards, float), 0.9).tolist() == expected


def test_rewards_that_failed_weigh_nothing():
    rewards = np.array([1.0, NAN, 7.0, INF, 4.5, -20.0, -INF, NAN])
    kept = [0, 2, 4, 5]
    for function, option in ((softmax_weights, 0.2), (threshold_weights, 0.9)):
        found = function(PROMPTS, rewards, option)
        assert found[[1, 3, 6, 7]].tolist() == [0] * 4  # "c" has no reward at all
        expected = function([PROMPTS[index] for index in kept], rewards[kept], option)
        np.testing.assert_array_equal(found[kept], expected)
