"""`TianshouVectorEnv`: a denoising vector environment as Tianshou takes it."""

import gymnasium as gym
import numpy as np
import pytest
import torch

pytest.importorskip("tianshou")
from gymnasium.wrappers.vector import ClipAction, RecordEpisodeStatistics, TransformReward
from tianshou.env import DummyVectorEnv

from diffusion_gym.agents.tianshou import (
    TianshouVectorEnv,
    ddpo_sf,
)
from diffusion_gym.wrappers import OneStepVectorEnv

T = 3


def test_it_is_what_tianshou_makes_of_single_environments(make, noise, same):
    keywords = make(1).spec.kwargs
    keywords = {key: keywords[key] for key in ("model", "reward", "prompts", "num_inference_steps")}
    theirs = DummyVectorEnv([lambda: gym.make("DiffusionDenoise-v0", **keywords)] * 3)
    ours = TianshouVectorEnv(make(3))
    assert len(ours) == len(theirs) and ours.is_async is False
    assert ours.action_space == theirs.action_space and ours.observation_space == theirs.observation_space
    for index in range(3):
        theirs.reset(index, seed=5 + index)
    # The second episode, because theirs has no way to seed all envs differently without a reset.
    ours.seed(5)
    ours.reset()
    order = np.array([2, 0, 1])
    (obs, infos), (obs_, infos_) = ours.reset(order), theirs.reset(order)
    same(obs, obs_)
    assert [info["prompt"] for info in infos] == [info["prompt"] for info in infos_]
    for step in range(2 * T):
        actions = noise(3, step)
        mine, other = ours.step(actions, order), theirs.step(actions, order)
        same(mine[0], other[0])
        np.testing.assert_allclose(mine[1], other[1], rtol=1e-5)  # decoded in batches of another size
        for flag, flag_ in zip(mine[2:4], other[2:4], strict=True):
            assert flag.dtype == np.bool_
            np.testing.assert_array_equal(flag, flag_)
        for info, info_ in zip(mine[4], other[4], strict=True):
            assert info.keys() == info_.keys() - {"image"}  # a picture at every step of the buffer would be too much
            assert info["env_id"] == info_["env_id"] and info["prompt"] == info_["prompt"]
            if "reward_components" in info:
                assert info["reward_components"].keys() == info_["reward_components"].keys()
        if mine[2].all():
            for ids in ([1], [0, 2]):  # by parts, as they end
                same(ours.reset(ids)[0], theirs.reset(ids)[0])
    assert step == 2 * T - 1 and mine[2].all()


def test_a_batch_is_stepped_at_once(make, noise):
    env = make(3)
    calls, step = [], env.unwrapped.step
    env.unwrapped.step = lambda actions: calls.append(len(actions)) or step(actions)
    adapted = TianshouVectorEnv(env)
    adapted.reset()
    adapted.step(noise(3))
    assert calls == [3]


def test_envs_left_out_stay_at_their_start(scored, noise):
    env, calls = scored
    envs = TianshouVectorEnv(env)
    start, infos = envs.reset(seed=1)
    moving = [3, 1]
    for step in range(T):
        obs, rewards, terminated, _, _ = envs.step(noise(2, step), moving)
        np.testing.assert_array_equal(obs.latents, noise(2, step))
    assert terminated.all() and calls == [2]  # what waits is not scored
    np.testing.assert_allclose(rewards, env.unwrapped.model.decode(torch.as_tensor(obs.latents)).mean((1, 2, 3)))
    envs.reset(moving)
    for step in range(T):  # the others begin where they were
        obs, rewards, terminated, _, rows = envs.step(noise(4, step))
        if step == 0:
            assert (obs.timestep == obs.timestep[0]).all()
    assert terminated.all() and calls == [2, 4]
    for index in (0, 2):
        assert rows[index]["prompt"] == infos[index]["prompt"]
        np.testing.assert_array_equal(obs.prompt[index], start.prompt[index])


def test_noise_of_envs_left_out_is_kept(make, noise):
    env = make(2)
    envs = TianshouVectorEnv(env)
    start, _ = envs.reset(seed=1)
    envs.step(noise(1), [0])
    np.testing.assert_array_equal(env.unwrapped._latents[1].numpy(), start.latents[1])
    np.testing.assert_array_equal(env.unwrapped._latents[0].numpy(), noise(1)[0])


def test_seeds_count_once(make):
    envs = TianshouVectorEnv(make(2))
    assert envs.seed([3, 9]) == [[3], [9]]
    one, two = envs.reset([1])[0].latents, envs.reset([0])[0].latents
    again = envs.reset()[0].latents
    envs.seed([3, 9])
    np.testing.assert_array_equal(envs.reset()[0].latents, np.concatenate([two, one]))
    assert not np.array_equal(again, np.concatenate([two, one]))
    np.testing.assert_array_equal(envs.reset(seed=[3, 9])[0].latents, np.concatenate([two, one]))


def test_attributes_and_pictures(make):
    env = make(2, render_mode="rgb_array")
    envs = TianshouVectorEnv(env)
    envs.reset()
    assert envs.get_env_attr("horizon", [1]) == [T]
    envs.set_env_attr("note", "kept")
    assert env.unwrapped.note == "kept"
    assert [frame.dtype for frame in envs.render()] == [np.uint8] * 2
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        envs.get_env_attr("nonsense")
    with pytest.raises(ValueError, match="share 'note'"):
        envs.set_env_attr("note", 1, [0])
    envs.close()
    assert env.closed
    with pytest.raises(AssertionError, match="after close"):
        envs.reset()


def test_gymnasium_wrappers_stay_below(make, noise):
    envs = TianshouVectorEnv(RecordEpisodeStatistics(make(2, output="numpy")))
    envs.reset()
    for step in range(T):
        infos = envs.step(noise(2, step))[4]
    assert [info["episode"]["l"] for info in infos] == [T, T]


def test_wrong_environments(make, make_env):
    for env in (make_env(2), make_env(2, autoreset_mode="NextStep")):
        with pytest.raises(ValueError, match="autoreset_mode='Disabled'"):
            TianshouVectorEnv(env)
    for env in (gym.make("CartPole-v1"), gym.make_vec("CartPole-v1", num_envs=2), None):
        with pytest.raises(ValueError, match="no denoising"):
            TianshouVectorEnv(env)
        with pytest.raises(ValueError, match="no denoising"):
            ddpo_sf(env)
    with pytest.raises(ValueError, match="single_observation_space="):
        TianshouVectorEnv(OneStepVectorEnv(make(2)))
    with pytest.raises(ValueError, match="single_action_space=.*clips"):
        TianshouVectorEnv(ClipAction(make(2, output="numpy")))


def test_wrong_calls(make, noise):
    envs = TianshouVectorEnv(make(3))
    envs.reset()
    with pytest.raises(ValueError, match="2 actions for the 3 envs"):
        envs.step(noise(2))
    with pytest.raises(ValueError, match=r"id=\[1, 1\]"):
        envs.step(noise(2), [1, 1])
    with pytest.raises(ValueError, match=r"id=\[3\]"):
        envs.reset([3])
    with pytest.raises(TypeError, match="seed and options, not speed"):
        envs.reset(speed=1)
    with pytest.raises(ValueError, match="lists 2 seeds for 3"):
        envs.seed([1, 2])
    envs.step(noise(3))
    with pytest.raises(ValueError, match=r"env \[0, 2\] out within an episode"):
        envs.step(noise(1), [1])
    short = TianshouVectorEnv(make(3, num_inference_steps=1))
    short.reset()
    with pytest.raises(ValueError, match="multiple of num_envs=3"):
        short.step(noise(1), [1])


def test_rewards_that_are_not_finite(make, noise):
    envs = TianshouVectorEnv(TransformReward(make(2, num_inference_steps=1), lambda r: r / torch.tensor([0.0, 1.0])))
    envs.reset()
    with pytest.raises(ValueError, match=r"reward of env \[0\] is NaN or infinite"):
        envs.step(noise(2))
