"""`SB3VecEnv`: a denoising vector environment as SB3 takes it."""

import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch

pytest.importorskip("stable_baselines3")
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor

from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.agents.sb3 import (
    SB3VecEnv,
)

T = 3


@pytest.mark.parametrize("mode", ["SameStep", "NextStep", "Disabled"])
@pytest.mark.parametrize("inner", ["torch", "numpy"])
def test_vec_env_is_what_sb3_makes_of_single_environments(make_env, make_single, mode, inner, same):
    ours = SB3VecEnv(make_env(3, num_inference_steps=T, autoreset_mode=mode, output=inner))
    reference = DummyVecEnv([make_single] * 3)  # SB3's own adapter
    ours.seed(5)
    reference.seed(5)
    same(ours.reset(), dict(reference.reset()))
    assert [info["prompt"] for info in ours.reset_infos] == [info["prompt"] for info in reference.reset_infos]
    rng = np.random.default_rng(0)
    for _ in range(2 * T + 1):
        actions = rng.standard_normal((3, 4, 4, 4)).astype(np.float32)
        (obs, rewards, dones, infos), (obs_, rewards_, dones_, infos_) = ours.step(actions), reference.step(actions)
        same(obs, dict(obs_))
        assert (rewards.dtype, dones.dtype) == (np.float32, np.bool_)
        np.testing.assert_allclose(rewards, rewards_, rtol=1e-5)  # decoded in batches of another size
        np.testing.assert_array_equal(dones, dones_)
        for info, info_ in zip(infos, infos_, strict=True):
            assert info.keys() - {"episode"} == info_.keys()
            assert info["TimeLimit.truncated"] is False and info["prompt"] == info_["prompt"]
            if "terminal_observation" in info_:
                same(info["terminal_observation"], info_["terminal_observation"])
                assert info["image"].shape == info_["image"].shape and info["image"].dtype == np.uint8
        assert [info["prompt"] for info in ours.reset_infos] == [info["prompt"] for info in reference.reset_infos]


def test_a_batch_is_stepped_at_once(make_env):
    env = make_env(3, num_inference_steps=T)
    calls = []
    step = env.unwrapped.step
    env.unwrapped.step = lambda actions: calls.append(len(actions)) or step(actions)
    adapted = SB3VecEnv(env)
    adapted.reset()
    adapted.step(np.zeros((3, 4, 4, 4), np.float32))
    assert calls == [3]


def test_episode_infos_are_those_of_vec_monitor(make_env):
    plain, monitored = (SB3VecEnv(make_env(3, num_inference_steps=T)) for _ in range(2))
    monitored = VecMonitor(monitored)
    for env in (plain, monitored):
        env.seed(1)
        env.reset()
    for _ in range(2):
        for _ in range(T):
            actions = np.ones((3, 4, 4, 4), np.float32)
            (_, rewards, dones, ours), (_, _, _, theirs) = plain.step(actions), monitored.step(actions)
        assert dones.all()
        for info, info_, reward in zip(ours, theirs, rewards, strict=True):
            assert info["episode"].keys() == info_["episode"].keys() == {"r", "l", "t"}
            assert info["episode"]["r"] == pytest.approx(float(info_["episode"]["r"])) == pytest.approx(float(reward))
            assert info["episode"]["l"] == info_["episode"]["l"] == T


def test_gymnasium_wrappers_stay_below(make_env):
    env = SB3VecEnv(RecordEpisodeStatistics(make_env(2, num_inference_steps=T, output="numpy")))
    env.reset()
    for _ in range(T):
        _, rewards, _, infos = env.step(np.ones((2, 4, 4, 4), np.float32))
    assert [info["episode"]["r"] for info in infos] == pytest.approx(rewards.tolist())
    assert env.env_is_wrapped(RecordEpisodeStatistics) == [True, True]
    assert env.env_is_wrapped(gym.wrappers.vector.NormalizeReward, indices=0) == [False]
    assert DenoisingPolicy.from_env(VecMonitor(env)).config.num_inference_steps == T


def test_attributes_and_methods(make_env):
    env = SB3VecEnv(make_env(3, num_inference_steps=T, render_mode="rgb_array"))
    assert env.get_attr("horizon", indices=[0, 2]) == [T, T]
    assert env.get_attr("action_space", 1) == [env.action_space]
    assert env.has_attr("prompt_set") and not env.has_attr("nothing")
    env.set_attr("note", "for all")
    assert env.get_attr("note") == ["for all"] * 3 and env.vector.note == "for all"
    with pytest.raises(ValueError, match="indices=.0. leave envs out"):
        env.set_attr("note", "for one", indices=[0])
    env.reset()
    frames = env.env_method("render", indices=[1])
    assert len(frames) == 1 and frames[0].shape == (8, 8, 3)
    np.testing.assert_array_equal(frames[0], env.get_images()[1])
    assert env.render().shape == (16, 16, 3)  # SB3 tiles three pictures as two by two
    env.close()
    with pytest.raises(gym.error.ClosedEnvironmentError):
        env.reset()


def test_seed_and_options_count_once(make_env):
    env = SB3VecEnv(make_env(2, num_inference_steps=T))
    assert env.seed(3) == [3, 4]
    env.set_options({"prompt": "a red circle", "latents": np.ones((4, 4, 4))})
    assert (env.reset()["latents"] == 1).all() and env.reset_infos[1]["prompt"] == "a red circle"
    fresh = env.reset()["latents"]
    env.seed(3)
    first = env.reset()["latents"]
    env.seed(3)
    again = env.reset()["latents"]
    assert (first == again).all() and (fresh != first).all()
    env.set_options([{"prompt": "two blue stars"}, {}])
    with pytest.raises(ValueError, match="options\\['prompt'\\] must be given for all 2"):
        env.reset()


def test_torch_output_stays_in_torch(make_env, same):
    env, numbers = (SB3VecEnv(make_env(2, num_inference_steps=T), output=kind) for kind in ("torch", "numpy"))
    for each in (env, numbers):
        each.seed(0)
        observation = each.reset()
    for _ in range(T):
        step, reference = (each.step(np.ones((2, 4, 4, 4), np.float32)) for each in (env, numbers))
    for values, expected in ((step[0], reference[0]), (step[3][1], reference[3][1])):
        values, expected = values.get("terminal_observation", values), expected.get("terminal_observation", expected)
        assert all(isinstance(value, torch.Tensor) for value in values.values())
        same({key: value.numpy() for key, value in values.items()}, expected)
    assert isinstance(step[1], np.ndarray) and isinstance(observation["latents"], np.ndarray)


def test_vec_env_refuses(make_env, make_single):
    with pytest.raises(ValueError, match="no denoising vector environment; make one with gym.make_vec"):
        SB3VecEnv(make_single())
    with pytest.raises(ValueError, match="no denoising vector environment"):
        SB3VecEnv(gym.make_vec("CartPole-v1", num_envs=2))
    with pytest.raises(ValueError, match="output='jax' must be 'numpy' or 'torch'"):
        SB3VecEnv(make_env(2), output="jax")
    with pytest.raises(ValueError, match="failed_rewards='drop' must be 'refuse' or 'keep'"):
        SB3VecEnv(make_env(2), failed_rewards="drop")
    with pytest.raises(ValueError, match="is unbounded, which SB3 refuses; take the wrapper off that clips"):
        SB3VecEnv(gym.wrappers.vector.ClipAction(make_env(2, output="numpy")))


def test_check_env_passes_with_known_warnings(make_single):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(make_single(), warn=True)
    told = {str(warning.message)[:60] for warning in caught if "stable_baselines3" in warning.filename}
    assert {line.split(" is ")[0][:40] for line in told} <= {
        "It seems that your observation latents",  # a latent is no uint8 picture, and no CnnPolicy reads it
        "It seems that your observation space lat",
        "The minimal resolution for an image",
        "We recommend you to use a symmetric and ",  # the bounds never clip, and nothing scales by them
    }
