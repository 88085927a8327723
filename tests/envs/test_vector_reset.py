"""Options and seeds of a reset of the vector environment, and its errors."""

import numpy as np
import pytest
import torch

SHAPE = (4, 4, 4)


@pytest.fixture
def env(make_env):
    return make_env(3, output="numpy", autoreset_mode="Disabled")


def test_fixed_prompt_keeps_the_noise_of_the_seed(env):
    drawn, drawn_info = env.reset(seed=3)
    fixed, info = env.reset(seed=3, options={"prompt": "a yellow star"})
    assert list(info["prompt"]) == ["a yellow star"] * 3 != list(drawn_info["prompt"])
    np.testing.assert_array_equal(fixed["latents"], drawn["latents"])
    assert (fixed["prompt"] != drawn["prompt"]).any()
    again, _ = env.reset(options={"prompt": "a yellow star"})
    assert (again["latents"] != fixed["latents"]).all()


def test_fixed_prompt_leaves_the_episode_after_it_as_it_was(env):
    env.reset(seed=3)
    _, wanted = env.reset()
    env.reset(seed=3, options={"prompt": "a yellow star"})
    _, info = env.reset()
    assert list(info["prompt"]) == list(wanted["prompt"])


def test_prompts_can_be_given_one_each(env):
    prompts = ["a red star", "two circles", "a cyan square"]
    observation, info = env.reset(seed=0, options={"prompt": prompts})
    assert list(info["prompt"]) == prompts
    np.testing.assert_array_equal(observation["prompt"], env.unwrapped.model.tokenize(prompts).numpy())


def test_prompts_given_one_each_follow_the_reset_mask(env):
    env.reset(seed=0)
    mask = np.array([False, True, False])
    _, before = env.reset(seed=0)
    _, info = env.reset(options={"prompt": ["a red star", "two circles", "a cyan square"], "reset_mask": mask})
    assert list(info["prompt"]) == [before["prompt"][0], "two circles", before["prompt"][2]]


@pytest.mark.parametrize("output", ["numpy", "torch"])
@pytest.mark.parametrize(
    "refused",
    [
        {"options": {"latents": np.zeros((4, 4, 5))}},
        {"options": {"latents": np.full(SHAPE, np.nan)}},
        {"options": {"latents": "noise"}},
        {"options": {"latents": [[1.0], [1.0, 2.0]]}},
        {"options": {"prompt": ["one"]}},
        {"options": {"prompt": ["one", "two", 3]}},
        {"options": {"prompt": "half a character \ud800"}},
        {"options": {"reset_mask": np.zeros(3, bool)}},
        {"options": {"prompt": "a red star", "promt": "a star"}},
        {"options": {"prompt": "a red star", "latents": np.zeros(3)}},
        {"options": {"prompt": "a red star"}, "seed": [1, 2]},
        {"seed": [1, -2, 3]},
    ],
    ids=str,
)
def test_a_refused_reset_changes_nothing(make_env, play, refused, output):
    """The episode, its prompts, the reward that sees them, and what is drawn after it."""
    seen = []

    def reward(images, prompts, metadata):
        seen.append(list(prompts))
        return images.mean((1, 2, 3))

    env, plain = (make_env(3, reward=reward, output=output, autoreset_mode="SameStep") for _ in range(2))
    play(env, steps=1), play(plain, steps=1)
    with pytest.raises(ValueError, match="options|seed"):
        env.reset(**{"seed": 9, **refused})
    for _ in range(5):
        actions = np.zeros((3, *SHAPE), np.float32)
        (observation, rewards, *_, infos), (wanted, wanted_rewards, *_, wanted_infos) = (
            env.step(actions),
            plain.step(actions),
        )
        for key in wanted:
            np.testing.assert_array_equal(observation[key], wanted[key])
        np.testing.assert_array_equal(rewards, wanted_rewards)
        assert list(infos["prompt"]) == list(wanted_infos["prompt"])
    assert len(seen) == 2 and seen[0] == seen[1]


@pytest.mark.parametrize("prompt", [5, ["a", "b"], ["a"], ["a", "b", 3], []])
def test_prompts_of_wrong_kind_or_number_are_refused(env, prompt):
    with pytest.raises(ValueError, match=r"options\['prompt'\]="):
        env.reset(options={"prompt": prompt})


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_latents_can_be_given_for_all_or_one_each(env, kind):
    each = np.random.default_rng(0).standard_normal((3, *SHAPE), dtype=np.float32)
    observation, _ = env.reset(options={"latents": kind(each)})
    np.testing.assert_array_equal(observation["latents"], each)
    observation, _ = env.reset(options={"latents": kind(each[0])})
    np.testing.assert_array_equal(observation["latents"], np.stack([each[0]] * 3))


def test_given_latents_are_copied(env):
    given = np.zeros(SHAPE, np.float32)
    env.reset(options={"latents": given})
    given[...] = 7
    observation, _ = env.reset(options={"latents": np.ones(SHAPE), "reset_mask": np.array([True, False, False])})
    assert observation["latents"].max(axis=(1, 2, 3)).tolist() == [1, 0, 0]


def test_fixed_latents_keep_the_prompt_of_the_seed(env):
    _, wanted = env.reset(seed=3)
    _, info = env.reset(seed=3, options={"latents": np.zeros(SHAPE)})
    assert list(info["prompt"]) == list(wanted["prompt"])


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (np.zeros((4, 4, 5)), r"\(4, 4, 5\).*\(4, 4, 4\)"),
        (np.full(SHAPE, np.nan), "NaN"),
        (np.full(SHAPE, np.inf), "inf"),
    ],
)
def test_latents_of_wrong_shape_or_not_finite_are_refused(env, latents, message):
    with pytest.raises(ValueError, match=rf"options\['latents'\].*{message}"):
        env.reset(options={"latents": latents})


def test_unknown_option_is_refused_with_the_closest(env):
    with pytest.raises(ValueError, match="'promt' is unknown; did you mean 'prompt'"):
        env.reset(options={"promt": "a star"})


@pytest.mark.parametrize("mask", [np.zeros(3, bool), np.ones(2, bool), np.array([1, 0, 0]), "all"])
def test_bad_reset_mask_is_refused(env, mask):
    with pytest.raises(ValueError, match=r"options\['reset_mask'\]=.*shape \(3,\) with at least one True"):
        env.reset(options={"reset_mask": mask})


def test_reset_mask_may_be_a_tensor(env):
    env.reset(seed=0)
    _, info = env.reset(options={"reset_mask": torch.tensor([False, True, False])})
    assert info["_prompt"].tolist() == [False, True, False]


@pytest.mark.parametrize("seed", [1.5, "abc", -1, [1, 2], [1, 2, "3"], [1, 2, -3], {1, 2, 3}, np.array(4)])
def test_bad_seed_is_refused(env, seed):
    with pytest.raises(ValueError, match="seed="):
        env.reset(seed=seed)


def test_seeds_may_be_numpy_integers(env):
    wanted, _ = env.reset(seed=4)
    for seed in (np.int64(4), np.array([4, 5, 6])):
        np.testing.assert_array_equal(env.reset(seed=seed)[0]["latents"], wanted["latents"])


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.uint16, np.int64])
def test_numpy_integers_do_not_wrap(env, kind):
    most = np.iinfo(kind).max
    wanted, _ = env.reset(seed=int(most))
    np.testing.assert_array_equal(env.reset(seed=kind(most))[0]["latents"], wanted["latents"])
    assert (env.reset(seed=[0] * 3)[0]["latents"][1] != wanted["latents"][1]).any()


def test_the_number_of_envs_may_be_a_small_numpy_integer(make_env):
    env = make_env(np.uint8(200))
    assert type(env.num_envs) is int and env.reset(seed=0)[0]["latents"].shape == (200, *SHAPE)


def test_a_seed_of_none_in_a_list_goes_on(env):
    env.reset(seed=0)
    wanted, _ = env.reset()
    env.reset(seed=0)
    observation, _ = env.reset(seed=[None, 9, None])
    same = (observation["latents"] == wanted["latents"]).all(axis=(1, 2, 3))
    assert same.tolist() == [True, False, True]


def test_latents_are_standard_normal(make_env):
    latents = make_env(256, output="numpy").reset(seed=0)[0]["latents"]
    assert abs(latents.mean()) < 4 / np.sqrt(latents.size)
    assert latents.std() == pytest.approx(1, abs=4 / np.sqrt(2 * latents.size))
