"""The single environment: the NumPy view of the vector environment at N = 1."""

import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec

SHAPE = (4, 4, 4)


@pytest.fixture
def make(tiny_pipeline):
    """`make(**keywords of gym.make)` on the tiny pipeline."""

    def made(**keywords):
        defaults = {"model": str(tiny_pipeline), "num_inference_steps": 4}
        return gym.make("DiffusionDenoise-v0", **{**defaults, **keywords})

    return made


def test_single_env_is_row_0_of_a_vector_env(make, tiny_pipeline, play):
    vector = gym.make_vec(
        "DiffusionDenoise-v0",
        model=str(tiny_pipeline),
        num_inference_steps=4,
        output="numpy",
        autoreset_mode="Disabled",
    )
    (first, first_info), *steps = play(make(), seed=5)
    (wanted, wanted_info), *wanted_steps = play(vector, seed=5)
    assert first_info == {"prompt": wanted_info["prompt"][0]}
    for key in wanted:
        np.testing.assert_array_equal(first[key], wanted[key][0])
    for (observation, reward, terminated, truncated, _), (batch, rewards, ended, _, _) in zip(
        steps, wanted_steps, strict=True
    ):
        for key in batch:
            np.testing.assert_array_equal(observation[key], batch[key][0])
        assert (reward, terminated, truncated) == (rewards[0], ended[0], False)


def test_types_are_gymnasiums(make, play):
    _, *steps = play(make())
    for number, (observation, reward, terminated, truncated, info) in enumerate(steps, start=1):
        assert type(reward) is float and type(terminated) is bool and type(truncated) is bool
        assert terminated == (number == 4)
        assert observation["latents"].shape == SHAPE and observation["timestep"].shape == (1,)
        assert type(info["prompt"]) is str


def test_info_of_the_last_step_has_picture_and_components(make, play):
    _, *_, before, last = play(make(reward="Compressibility"))
    _, reward, _, _, info = last
    assert before[4].keys() == {"prompt"}
    assert info.keys() == {"prompt", "image", "reward_components"}
    assert info["image"].dtype == np.uint8 and info["image"].shape == (8, 8, 3)
    assert info["reward_components"].keys() == {"jpeg_kb"}
    assert info["reward_components"]["jpeg_kb"] == -reward > 0


def test_options_fix_prompt_and_latents(make):
    env = make()
    drawn, _ = env.reset(seed=1)
    observation, info = env.reset(seed=1, options={"prompt": "a red star"})
    assert info["prompt"] == "a red star"
    np.testing.assert_array_equal(observation["latents"], drawn["latents"])
    observation, _ = env.reset(seed=1, options={"latents": np.ones(SHAPE, np.float32)})
    np.testing.assert_array_equal(observation["latents"], np.ones(SHAPE))


def test_np_random_is_the_generator_that_draws(make):
    env = make().unwrapped
    env.reset(seed=3)
    assert env.np_random_seed == 3
    env.np_random.standard_normal(100)
    moved, _ = env.reset()
    env.reset(seed=3)
    unmoved, _ = env.reset()
    assert (moved["latents"] != unmoved["latents"]).any()


def test_step_before_reset_and_after_the_end_is_refused(make, play):
    env = make().unwrapped
    with pytest.raises(gym.error.ResetNeeded, match="reset"):
        env.step(np.zeros(SHAPE, np.float32))
    play(env)
    with pytest.raises(gym.error.ResetNeeded, match="are over; reset them first"):
        env.step(np.zeros(SHAPE, np.float32))
    env.reset()
    env.step(np.zeros(SHAPE, np.float32))


@pytest.mark.parametrize(
    "action", [np.zeros((1, *SHAPE), np.float32), np.zeros(SHAPE), np.zeros(SHAPE[1:], np.float32), [0.0], 5]
)
def test_bad_action_is_refused(make, action):
    env = make().unwrapped
    env.reset(seed=0)
    with pytest.raises(ValueError, match="action") as caught:
        env.step(action)
    assert "(1, 4, 4, 4)" not in str(caught.value).partition(";")[2]


@pytest.mark.parametrize(
    "options", [{"latents": np.zeros((1, 4, 4))}, {"latents": "noise"}, {"prompt": ["a", "b"]}, {"prompt": 5}], ids=str
)
def test_a_refused_reset_speaks_of_one_env_and_changes_nothing(make, play, options):
    env, plain = make(), make()
    for each in (env, plain):
        each.reset(seed=3)
    with pytest.raises(ValueError, match=r"options\[.* (give \(4, 4, 4\)|must be a string)$"):
        env.reset(seed=9, options=options)
    assert env.unwrapped.np_random_seed == 3
    np.testing.assert_array_equal(env.reset()[0]["latents"], plain.reset()[0]["latents"])


def test_action_may_be_a_tensor(make):
    env = make().unwrapped
    env.reset(seed=0)
    observation, *_ = env.step(torch.ones(SHAPE))
    assert isinstance(observation["latents"], np.ndarray) and (observation["latents"] == 1).all()


@pytest.mark.parametrize(("name", "value"), [("num_envs", 2), ("autoreset_mode", "NextStep"), ("output", "torch")])
def test_keywords_of_the_vector_env_are_refused(make, name, value):
    with pytest.raises(TypeError, match=f"{name}={value!r} belongs to gym.make_vec"):
        make(**{name: value})


def test_unknown_keyword_is_refused_with_the_closest(make):
    with pytest.raises(TypeError, match="'num_inference_step' is unknown; did you mean 'num_inference_steps'"):
        make(num_inference_step=3)


def test_render_gives_the_picture_of_the_present_latents(make, play):
    env = make(render_mode="rgb_array")
    env.reset(seed=0)
    first = env.render()
    assert first.dtype == np.uint8 and first.shape == (8, 8, 3)
    *_, (_, _, _, _, info) = play(env)
    np.testing.assert_array_equal(env.unwrapped.render(), info["image"])
    assert (first != info["image"]).any()


def test_render_without_a_mode_is_none_and_says_so(make):
    env = make().unwrapped
    env.reset(seed=0)
    with pytest.warns(UserWarning, match="render_mode='rgb_array'"):
        assert env.render() is None


def test_closed_env_is_refused(make):
    env = make().unwrapped
    env.reset(seed=0)
    env.close()
    env.close()
    with pytest.raises(gym.error.ClosedEnvironmentError, match="make a new one"):
        env.reset()


def test_spec_makes_the_env_again_also_through_json(make, play):
    env = make(reward="Incompressibility", guidance_scale=2.0, prompts=["a red star"])
    text = env.spec.to_json()
    assert json.loads(text)["kwargs"]["reward"] == "Incompressibility"
    *_, (wanted, reward, *_) = play(env)
    for spec in (env.spec, EnvSpec.from_json(text)):
        again = gym.make(spec)
        assert again.unwrapped.vector.sampler_config == env.unwrapped.vector.sampler_config
        *_, (observation, other_reward, *_) = play(again)
        assert other_reward == reward > 0
        np.testing.assert_array_equal(observation["latents"], wanted["latents"])
