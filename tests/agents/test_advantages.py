"""Advantages against hand calculations."""

import json
import warnings

import numpy as np
import pytest

from diffusion_gym.agents.advantages import (
    AdvantageOptions,
    NoUsableReward,
    PromptStatistics,
    RewardNormalizer,
    batch_normalize,
    group_normalize,
    usable_rewards,
)

ROOT = 1.5**0.5  # 1, 2, 3 have standard deviation sqrt(2/3)


def array(*values):
    return np.array(values, dtype=np.float64)


@pytest.mark.parametrize(
    "rewards, expected",
    [
        (array(1, 2, 3), [-ROOT, 0, ROOT]),
        (array(-5, 5), [-1, 1]),
        (array(10, 10, 10, 14), [-1 / 3**0.5] * 3 + [3**0.5]),
        (array(7), [0]),
        (array(3, 3, 3), [0, 0, 0]),
    ],
)
def test_batch_normalisation(rewards, expected):
    np.testing.assert_allclose(batch_normalize(rewards), expected, rtol=1e-12, atol=1e-12)


def test_the_floor_of_the_standard_deviation():
    np.testing.assert_allclose(batch_normalize(array(1, 3), std_floor=4.0), [-0.25, 0.25])
    np.testing.assert_allclose(batch_normalize(array(0, 2e-9)), [-1e-3, 1e-3])


# --- groups ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size, groups", [(2, 6), (3, 4), (4, 3), (6, 2), (12, 1)])
def test_groups_are_runs_of_samples_normalised_by_their_own_mean_and_deviation(group_size, groups):
    rewards = np.random.default_rng(0).normal(3, 20, 12) ** 3
    advantages = group_normalize(rewards, group_size)
    for number in range(groups):
        own = rewards[number * group_size : (number + 1) * group_size]
        expected = (own - np.mean(own)) / np.std(own)
        np.testing.assert_allclose(advantages[number * group_size : (number + 1) * group_size], expected, rtol=1e-12)


def test_groups_by_hand():
    rewards = array(1, 2, 3, -500, 500, 500, 7, 7, 7)
    expected = [-ROOT, 0, ROOT, -(2**0.5), 0.5**0.5, 0.5**0.5, 0, 0, 0]
    np.testing.assert_allclose(group_normalize(rewards, 3), expected, rtol=1e-12, atol=1e-12)


def test_groups_do_not_mix():
    rewards = np.random.default_rng(0).normal(size=12)
    before = group_normalize(rewards, 4)
    rewards[4:8] = [1e6, np.nan, -3, 0]
    after = group_normalize(rewards, 4)
    assert after[:4].tolist() == before[:4].tolist() and after[8:].tolist() == before[8:].tolist()


@pytest.mark.parametrize("missing", [np.nan, np.inf, -np.inf])
def test_a_missing_reward_does_not_count_in_its_group(missing):
    advantages = group_normalize(array(1, missing, 2, 3, 5, 5, missing, 9), 4)
    np.testing.assert_allclose(advantages[[0, 2, 3]], [-ROOT, 0, ROOT], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(advantages[[4, 5, 7]], [-(0.5**0.5), -(0.5**0.5), 2**0.5], rtol=1e-12)
    assert not np.isfinite(advantages[[1, 6]]).any()


def test_a_group_with_one_reward_or_none_is_no_reason_to_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        advantages = group_normalize(array(np.nan, np.nan, 8, np.nan, 1, 3), 2)
    assert np.isnan(advantages[:2]).all() and advantages[2] == 0 and np.isnan(advantages[3])
    assert advantages[4:].tolist() == [-1, 1]


def test_the_floor_of_a_groups_deviation():
    np.testing.assert_allclose(group_normalize(array(0, 2e-9, 1, 3), 2), [-1e-3, 1e-3, -1, 1])
    np.testing.assert_allclose(group_normalize(array(0, 8, 1, 3), 2, std_floor=2.0), [-1, 1, -0.5, 0.5])


# --- prompts ---------------------------------------------------------------------------------------------------


def test_each_prompt_is_compared_with_itself():
    statistics = PromptStatistics(buffer_size=8, min_count=2)
    advantages = statistics.normalize(["a", "b", "a", "b", "a"], array(1, 100, 2, 300, 3))
    np.testing.assert_allclose(advantages, [-ROOT, -1, 0, 1, ROOT], rtol=1e-12, atol=1e-12)


def test_statistics_run_over_calls():
    statistics = PromptStatistics(buffer_size=8, min_count=2)
    statistics.normalize(["a", "a"], array(1, 2))
    # the buffer holds 1, 2, 3 now
    np.testing.assert_allclose(statistics.normalize(["a"], array(3)), [ROOT])


def test_the_buffer_forgets_the_oldest():
    statistics = PromptStatistics(buffer_size=2, min_count=2)
    statistics.normalize(["a", "a"], array(1000, 2000))
    np.testing.assert_allclose(statistics.normalize(["a", "a"], array(3, 5)), [-1, 1])
    # of three new rewards the first is gone again: mean 6, standard deviation 1
    np.testing.assert_allclose(statistics.normalize(["a", "a", "a"], array(1, 5, 7)), [-5, -1, 1])


def test_below_the_minimum_count_the_batch_stands_in():
    statistics = PromptStatistics(buffer_size=8, min_count=3)
    rewards = array(1, 2, 3, 30, 50)
    advantages = statistics.normalize(["a", "a", "a", "b", "b"], rewards)
    np.testing.assert_allclose(advantages[:3], [-ROOT, 0, ROOT], rtol=1e-12, atol=1e-12)
    mean = 86 / 5
    std = (((1 - mean) ** 2 + (2 - mean) ** 2 + (3 - mean) ** 2 + (30 - mean) ** 2 + (50 - mean) ** 2) / 5) ** 0.5
    np.testing.assert_allclose(advantages[3:], [(30 - mean) / std, (50 - mean) / std], rtol=1e-12)
    # with a third reward, 40 +- sqrt(200/3), prompt b stands on its own
    np.testing.assert_allclose(statistics.normalize(["b"], array(40)), [0], atol=1e-12)


@pytest.mark.parametrize("floor, expected", [(1e-6, 0.5), (1e-3, 5e-4)])
def test_equal_rewards_of_a_prompt_divide_by_the_floor(floor, expected):
    statistics = PromptStatistics(buffer_size=4, min_count=2, std_floor=floor)
    assert statistics.normalize(["a", "a"], array(5, 5)).tolist() == [0, 0]
    advantages = PromptStatistics(buffer_size=4, min_count=2, std_floor=floor).normalize(["a", "a"], array(5, 5 + 1e-6))
    np.testing.assert_allclose(advantages[1], min(1, expected), rtol=1e-3)


def test_the_state_survives_a_checkpoint():
    rng = np.random.default_rng(0)
    statistics = PromptStatistics(buffer_size=3, min_count=2)
    prompts = ["a", "b", "a", "c"] * 3
    statistics.normalize(prompts, rng.normal(size=12))
    restored = PromptStatistics(buffer_size=3, min_count=2)
    restored.load(json.loads(json.dumps(statistics.state())))
    for _ in range(2):  # twice: the restored buffer must also forget at the same length
        rewards = rng.normal(size=12)
        assert restored.normalize(prompts, rewards).tolist() == statistics.normalize(prompts, rewards).tolist()


def test_loading_replaces_what_was_there():
    statistics = PromptStatistics(buffer_size=4, min_count=1)
    statistics.normalize(["a"], array(9))
    statistics.load({"b": [1.0, 2.0]})
    assert statistics.state() == {"b": [1.0, 2.0]}


def test_prompts_and_rewards_of_unequal_length_are_refused():
    with pytest.raises(ValueError):
        PromptStatistics().normalize(["a"], array(1, 2))


@pytest.mark.parametrize("buffer_size, min_count", [(4, 5), (4, 0), (0, 1)])
def test_a_minimum_that_could_never_be_reached_is_refused(buffer_size, min_count):
    with pytest.raises(ValueError, match=f"min_count={min_count} must lie between 1 and buffer_size={buffer_size}"):
        PromptStatistics(buffer_size, min_count)


# --- rewards become advantages, one way for native agents and libraries ----------------------------------------------


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"normalization": "none"}, [1, 3, np.nan, 5]),
        ({"normalization": "batch"}, [-ROOT, 0, np.nan, ROOT]),
        ({"normalization": "prompt", "statistics_min_count": 2}, [-1, 1, np.nan, ROOT]),  # b has one reward alone
        ({"normalization": "group", "group_size": 2}, [-1, 1, np.nan, 0]),
    ],
)
def test_normalised_rewards(options, expected):
    normalizer = RewardNormalizer(AdvantageOptions(**options, advantage_clip=0.5))
    normalized = normalizer.normalize(["a", "a", "b", "b"], array(1, 3, np.inf, 5))
    np.testing.assert_allclose(normalized, expected, rtol=1e-12)
    np.testing.assert_allclose(normalizer.clip(normalized), np.clip(expected, -0.5, 0.5))


def test_prompts_are_remembered_from_one_iteration_to_the_next():
    normalizer = RewardNormalizer(AdvantageOptions(statistics_min_count=2))
    normalizer.normalize(["a", "b"], array(0, 10))
    np.testing.assert_allclose(normalizer.normalize(["a", "b"], array(2, np.nan)), [1, np.nan])
    assert normalizer.statistics.state() == {"a": [0, 2], "b": [10]}


def test_no_usable_reward_is_an_error():
    assert usable_rewards(array(np.nan, 1, -np.inf, 2)).tolist() == [1, 3]
    for normalization in ("prompt", "batch", "none"):
        with pytest.raises(
            NoUsableReward, match="all 2 rewards of the iteration are NaN or infinite; check the reward"
        ):
            RewardNormalizer(AdvantageOptions(normalization=normalization)).normalize(["a"] * 2, array(np.nan, np.inf))


# --- deviations, components, groups without a difference ------------------------------------------------------------


@pytest.mark.parametrize("deviation", ["own", "batch", "none"])
def test_groups_by_another_deviation(deviation):
    """`batch` is Flow-GRPO's `global_std`: the group's mean, the deviation of all."""
    rewards = array(1, 3, 10, 30, 7, 7, np.nan, 5)
    found = group_normalize(rewards, 2, deviation=deviation)
    std = {"own": [1, 1, 10, 10, 1, 1, 1, 1], "batch": [np.nanstd(rewards)] * 8, "none": [1] * 8}[deviation]
    np.testing.assert_allclose(found, array(-1, 1, -10, 10, 0, 0, np.nan, 0) / std, rtol=1e-12)


def test_a_prompts_mean_with_the_deviation_of_the_batch():
    options = AdvantageOptions(statistics_min_count=2, statistics_buffer=4, reward_deviation="batch")
    rewards = array(1, 3, 10, 30)
    found = RewardNormalizer(options).normalize(["a", "a", "b", "b"], rewards)
    np.testing.assert_allclose(found, array(-1, 1, -10, 10) / rewards.std(), rtol=1e-12)


def test_components_are_normalised_on_their_own_before_they_are_summed_up():
    """GDPO: both rewards count alike, although one is a thousand times larger; then the batch has deviation 1."""
    options = AdvantageOptions("group", group_size=4, component_weights=("small=1", "large=2"))
    small, large = np.random.default_rng(3).normal(size=(2, 8)) * array([1], [1000])
    large[5] = np.nan
    found = RewardNormalizer(options).normalize(["a"] * 8, small + large, {"small": small, "large": large})
    total = group_normalize(small, 4) + 2 * group_normalize(large, 4)
    kept = np.isfinite(total)
    np.testing.assert_allclose(found[kept], (total[kept] - total[kept].mean()) / total[kept].std(), rtol=1e-12)
    assert np.isnan(found[5]) and kept.sum() == 7


@pytest.mark.parametrize("skip", [False, True])
def test_groups_without_a_difference_are_counted_and_left_out_on_request(skip):
    normalizer = RewardNormalizer(AdvantageOptions("group", group_size=2, skip_equal_groups=skip))
    found = normalizer.normalize(["a"] * 6, array(1, 1, 2, 4, np.nan, 3))
    own = [np.nan] * 2 if skip else [0, 0]
    np.testing.assert_array_equal(found, [*own, -1, 1, np.nan, np.nan if skip else 0])
    assert normalizer.equal_share == pytest.approx(2 / 3)
    np.testing.assert_array_equal(normalizer.normalize(["a"] * 4, array(1, 1, 2, 2)), [0, 0, 0, 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward_deviation": "mine"}, "reward_deviation='mine' must be one of own, batch, none"),
        ({"component_weights": ("a",)}, "component_weights='a' must be NAME=WEIGHT"),
        ({"component_weights": ("a=nan",)}, "component_weights='a=nan' must be NAME=WEIGHT"),
        ({"component_weights": ("a=1",)}, r"component_weights=\('a=1',\) goes with normalization='group' or 'batch'"),
    ],
)
def test_options_that_cannot_be_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AdvantageOptions(**options)


def test_a_librarys_rollouts_have_no_components():
    options = AdvantageOptions("batch", component_weights=("a=1",))
    with pytest.raises(ValueError, match="needs the reward's components, which a library's rollouts do not keep"):
        RewardNormalizer(options).normalize(["a"], array(1))
