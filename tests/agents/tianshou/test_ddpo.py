"""`TrajectoryRewards`: what happens to a rollout before the update."""

import numpy as np
import pytest
import torch

pytest.importorskip("tianshou")
from tianshou.data import Batch
from tianshou.utils.torch_utils import policy_within_training_step

from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.agents.tianshou import (
    TrajectoryCollector,
    TrajectoryRewards,
    ddpo_is,
)

T = 3
SHAPE = (4, 4, 4)


@pytest.fixture
def rollout(noise):
    """`rollout(rewards, prompts)`: a batch of whole trajectories without a policy behind it."""

    def make(rewards, prompts, horizon=T, step_rewards=0.0):
        number = len(rewards)
        latents = noise(number * (horizon + 1)).reshape(number, horizon + 1, *SHAPE)
        rew = np.full((number, horizon), step_rewards)
        rew[:, -1] += rewards
        done = np.zeros((number, horizon), dtype=bool)
        done[:, -1] = True
        return Batch(
            obs=Batch(latents=latents[:, :-1].reshape(-1, *SHAPE)),
            act=latents[:, 1:].reshape(-1, *SHAPE),
            rew=rew.ravel(),
            done=done.ravel(),
            info=Batch(prompt=np.repeat(np.array(prompts, dtype=object), horizon)),
        )

    return make


def test_rewards_by_prompt(make, rollout):
    policy = DenoisingPolicy.from_env(make(2))
    rewards = TrajectoryRewards(policy, "prompt", statistics_min_count=2)
    batch = rollout([1.0, 3.0, 10.0, 4.0], ["a", "a", "b", "c"], step_rewards=0.5)
    rewards.normalize(batch)
    totals = np.array([1.0, 3.0, 10.0, 4.0]) + T * 0.5
    expected = np.array([-1.0, 1.0, *(totals[2:] - totals.mean()) / totals.std()])
    np.testing.assert_allclose(batch.rew.reshape(4, T)[:, -1], expected)
    assert not batch.rew.reshape(4, T)[:, :-1].any()


def test_rewards_as_they_are(make, rollout):
    rewards = TrajectoryRewards(DenoisingPolicy.from_env(make(2)), "none")
    batch = rollout([1.0, 3.0], ["a", "b"], step_rewards=0.5)
    rewards.normalize(batch)
    np.testing.assert_array_equal(batch.rew, [0.5, 0.5, 1.5, 0.5, 0.5, 3.5])


def test_rollouts_of_parts(make, rollout):
    rewards = TrajectoryRewards(DenoisingPolicy.from_env(make(2)), "batch")
    whole = rollout([1.0, 3.0], ["a", "b"])
    for part in (whole[:-1], whole[1:], whole[1:-2]):  # cut at the end, at the beginning, at both
        with pytest.raises(ValueError, match=f"not whole trajectories of T={T} steps"):
            rewards.normalize(part)
    for name, value in (("act", np.clip(whole.act, -1, 1)), ("obs", Batch(latents=whole.obs.latents * 0.5))):
        with pytest.raises(ValueError, match="not the actions before them"):
            rewards.normalize(Batch({**dict(whole.items()), name: value}))


def test_a_value_network_is_a_baseline(make):
    env = make(2)
    algorithm = ddpo_is(env, value_network=True, vf_coef=0.5, learning_rate=1e-3, normalization="none")
    collector = TrajectoryCollector(algorithm, env, 4)
    collector.reset()
    collector.collect(n_episode=4)
    batch, indices = collector.buffer.sample(0)
    rewards = np.repeat(batch.rew[T - 1 :: T], T)
    before = algorithm.critic(batch.obs).detach().flatten()
    prepared = algorithm._preprocess_batch(batch, collector.buffer, indices)
    torch.testing.assert_close(prepared.adv, torch.as_tensor(rewards).float() - before, rtol=1e-4, atol=1e-5)
    with policy_within_training_step(algorithm.policy):
        algorithm.update(buffer=collector.buffer, batch_size=None, repeat=3)
    after = algorithm.critic(batch.obs).detach().flatten()
    errors = [float(((values - torch.as_tensor(rewards)) ** 2).mean()) for values in (before, after)]
    assert errors[1] < errors[0]
