"""Steps of the vector environment: its actions, and the rewards at the end."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from diffusion_gym.rewards import RewardError, RewardOutput
from episodes import to_the_end, zeros

SHAPE = (4, 4, 4)


@pytest.fixture
def env(make_env):
    return make_env(3, output="numpy", autoreset_mode="Disabled")


# --- actions ---------------------------------------------------------------------------------------------------------


def test_timesteps_descend_and_the_last_state_has_one_of_its_own(env):
    seen = [env.reset(seed=0)[0]["timestep"]]
    seen += [env.step(zeros(env))[0]["timestep"] for _ in range(4)]
    table = env.unwrapped.step_table.timesteps.tolist()
    np.testing.assert_array_equal(np.stack(seen), np.tile(np.reshape([*table, -1], (5, 1, 1)), (3, 1)))
    assert table == sorted(table, reverse=True)


def test_action_becomes_the_latents(env):
    env.reset(seed=0)
    action = np.random.default_rng(0).standard_normal((3, *SHAPE), dtype=np.float32)
    np.testing.assert_array_equal(env.step(action)[0]["latents"], action)


def test_read_only_and_reversed_arrays_are_actions_too(env, recwarn):
    env.reset(seed=0)
    action = np.random.default_rng(0).standard_normal((3, *SHAPE), dtype=np.float32)
    np.testing.assert_array_equal(env.step(action[:, ::-1])[0]["latents"], action[:, ::-1])
    action.flags.writeable = False
    np.testing.assert_array_equal(env.step(action)[0]["latents"], action)
    assert not recwarn.list


@pytest.mark.parametrize("actions", [[[1.0]], 5, None])
def test_actions_of_another_type_are_refused(env, actions):
    env.reset(seed=0)
    with pytest.raises(ValueError, match="actions=.* must be a torch tensor or a NumPy array"):
        env.step(actions)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.zeros((2, *SHAPE), np.float32), r"shape \(2, 4, 4, 4\); .* \(3, 4, 4, 4\)"),
        (np.zeros((3, *SHAPE)), "dtype float64; convert them to float32"),
        (torch.zeros(3, *SHAPE, dtype=torch.float16), "dtype torch.float16; convert them to float32"),
        (torch.zeros(3, *SHAPE, device="meta"), "on meta, the environment is on cpu; move them there"),
    ],
)
def test_refused_actions_leave_the_episode_as_it_was(env, actions, message):
    before, _ = env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(actions)
    observation, *_ = env.step(before["latents"])
    np.testing.assert_array_equal(observation["latents"], before["latents"])
    assert (observation["timestep"] == env.unwrapped.step_table.timesteps[1].item()).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("taken", range(5))
def test_actions_that_are_not_finite_name_their_env_and_change_nothing(make_env, play, mode, value, taken):
    """At every step, the last and the one that resets included: the same episode goes on as if never refused."""
    env, plain = (make_env(3, output="numpy", autoreset_mode=mode) for _ in range(2))
    taken = min(taken, 3) if mode is AutoresetMode.DISABLED else taken
    play(env, steps=taken), play(plain, steps=taken)
    actions = zeros(env)
    actions[1, 0, 0, 0] = value
    if mode is AutoresetMode.NEXT_STEP and taken == 4:  # a reset, whatever the actions
        env.step(actions), plain.step(zeros(env))
    with pytest.raises(ValueError, match=r"NaN or infinite values in env \[1\]; no env was stepped"):
        env.step(actions)
    for _ in range(4 - taken if mode is AutoresetMode.DISABLED else 5):
        (observation, rewards, *_), (wanted, wanted_rewards, *_) = env.step(zeros(env)), plain.step(zeros(env))
        for key in wanted:
            np.testing.assert_array_equal(observation[key], wanted[key])
        np.testing.assert_array_equal(rewards, wanted_rewards)


def test_a_refused_last_action_and_a_masked_reset_leave_the_others_their_step(env):
    env.reset(seed=0)
    for _ in range(3):
        env.step(zeros(env))
    actions = zeros(env)
    actions[0] = np.nan
    with pytest.raises(ValueError, match=r"in env \[0\]"):
        env.step(actions)
    env.reset(options={"reset_mask": np.array([True, False, False])})
    _, rewards, terminations, *_ = env.step(zeros(env))
    assert terminations.tolist() == [False, True, True] and (rewards[1:] != 0).all()


@pytest.mark.gpu
def test_on_a_gpu_actions_that_are_not_finite_are_refused_at_the_end_and_need_a_reset(make_env):
    env = make_env(2, device="cuda", autoreset_mode="Disabled")
    env.reset(seed=0)
    actions = torch.zeros(2, *SHAPE, device="cuda")
    env.step(torch.full_like(actions, torch.nan).index_fill(0, torch.tensor([0], device="cuda"), 0.0))
    for _ in range(2):
        env.step(actions)
    with pytest.raises(
        ValueError, match=r"in env \[1\]; no env was stepped: reset env \[1\], whose earlier actions did"
    ):
        env.step(actions)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(actions)
    env.reset(options={"reset_mask": np.array([False, True])})
    assert env.step(actions)[2].tolist() == [True, False]


def test_gradients_do_not_enter_the_environment(make_env):
    env = make_env(2)
    env.reset(seed=0)
    observation, *_ = env.step(torch.zeros(2, *SHAPE, requires_grad=True))
    assert not observation["latents"].requires_grad


# --- rewards ---------------------------------------------------------------------------------------------------------


def test_reward_sees_the_decoded_pictures_and_their_prompts(make_env):
    seen = []

    def reward(images, prompts, metadata):
        seen.append((images.clone(), list(prompts), len(metadata)))
        return torch.arange(len(prompts))

    env = make_env(3, reward=reward, output="numpy", autoreset_mode="Disabled")
    _, info = env.reset(seed=0)
    for _ in range(4):
        assert not seen
        _, rewards, *_ = env.step(zeros(env))
    [(images, prompts, metadata)] = seen
    assert (prompts, metadata) == (list(info["prompt"]), 3)
    assert images.shape == (3, 3, 8, 8) and 0 <= images.min() < images.max() <= 1
    torch.testing.assert_close(images, env.unwrapped.model.decode(torch.zeros(3, *SHAPE)))
    assert rewards.dtype == np.float32 and rewards.tolist() == [0, 1, 2]


def test_reward_gets_only_the_episodes_that_end(make_env):
    sizes = []

    def reward(images, prompts, metadata):
        sizes.append(len(images))
        return images.mean((1, 2, 3))

    env = make_env(3, reward=reward, output="numpy")
    env.reset(seed=0)
    env.step(zeros(env))
    env.reset(options={"reset_mask": np.array([True, False, False])})
    for _ in range(4):
        env.step(zeros(env))
    assert sizes == [2, 1]


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_reward_that_raises_is_named_and_the_env_goes_on_after_a_reset(make_env, mode):
    fails = [True]

    def flaky(images, prompts, metadata):
        if fails:
            raise KeyError("no such server")
        return images.mean((1, 2, 3))

    env = make_env(2, reward=flaky, output="numpy", autoreset_mode=mode)
    with pytest.raises(RewardError, match="reward='flaky' raised KeyError: 'no such server'"):
        to_the_end(env)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(zeros(env))
    fails.clear()
    assert to_the_end(env)[2].all()


@pytest.mark.parametrize(
    ("answer", "shape"),
    [
        (lambda n: torch.zeros(n, 1), r"scores of shape \(2, 1\)"),
        (lambda n: torch.zeros(n + 1), r"scores of shape \(3,\)"),
        (lambda n: 0.5, r"scores of shape \(\)"),
        (lambda n: RewardOutput(torch.zeros(n), {"part": torch.zeros(1)}), r"part of shape \(1,\)"),
    ],
)
def test_reward_of_wrong_shape_is_refused(make_env, answer, shape):
    def wrong(images, prompts, metadata):
        return answer(len(images))

    with pytest.raises(RewardError, match=rf"reward='wrong' returned {shape} for 2 images; .* shape \(2,\)"):
        to_the_end(make_env(2, reward=wrong))


def test_reward_that_is_not_finite_passes_through(make_env):
    def partial(images, prompts, metadata):
        return [float("nan"), float("-inf"), 1.0]

    rewards = to_the_end(make_env(3, reward=partial, output="numpy"))[1]
    np.testing.assert_array_equal(rewards, [np.nan, -np.inf, 1])
