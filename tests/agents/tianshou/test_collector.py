"""`TrajectoryCollector`: whole trajectories, also where Tianshou leaves envs out."""

import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("tianshou")

from diffusion_gym.agents.tianshou import (
    GuidedActor,
    GuidedPolicy,
    TrajectoryCollector,
    ddpo_is,
    ddpo_sf,
)
from diffusion_gym.wrappers import KLPenaltyVectorEnv

T = 3
SHAPE = (4, 4, 4)


@pytest.mark.parametrize("episodes", [3, 4, 6, 9])
def test_collecting_episodes(scored, episodes):
    """Also where Tianshou leaves envs out: too few episodes for them, or too few for another round."""
    env, calls = scored
    algorithm = ddpo_sf(env)
    collector = TrajectoryCollector(algorithm, env, episodes)
    collector.reset(gym_reset_kwargs={"seed": 0})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Tianshou says that envs are idle
        stats = collector.collect(n_episode=episodes)
    assert stats.n_collected_episodes == episodes and stats.n_collected_steps == episodes * T
    assert sum(calls) == episodes  # no reward query is wasted
    assert (stats.lens == T).all()
    batch, _ = collector.buffer.sample(0)
    latents, actions = (part.reshape(episodes, T, *SHAPE) for part in (batch.obs.latents, batch.act))
    np.testing.assert_array_equal(latents[:, 1:], actions[:, :-1])
    np.testing.assert_array_equal(batch.obs_next.latents.reshape(latents.shape)[:, :-1], actions[:, :-1])
    assert len(np.unique(latents[:, 0, 0, 0, 0])) == episodes  # all trajectories are different
    pictures = env.unwrapped.model.decode(torch.as_tensor(actions[:, -1]))
    np.testing.assert_allclose(batch.rew.reshape(episodes, T).sum(1), pictures.mean((1, 2, 3)), rtol=1e-5)


def test_collecting_steps(make):
    env = make(4)
    algorithm = ddpo_sf(env)
    collector = TrajectoryCollector(algorithm, env, episodes=8)
    collector.reset()
    assert collector.collect(n_step=4).n_collected_episodes == 0
    assert collector.collect(n_step=4 * (2 * T - 1)).n_collected_episodes == 8  # goes on where it was
    algorithm.rewards.normalize(collector.buffer.sample(0)[0])


def test_kl_penalty_by_the_environment(make, make_policy):
    """RLHF's way, for algorithms whose loss one does not want to change."""
    env = make(2)
    policy = make_policy(env, scale=0.2)
    penalised = KLPenaltyVectorEnv(env, policy, beta=0.5, estimator="exact")
    algorithm = ddpo_is(penalised, GuidedPolicy(GuidedActor(policy)))
    collector = TrajectoryCollector(algorithm, penalised, episodes=2)
    collector.reset()
    collector.collect(n_episode=2)
    batch, _ = collector.buffer.sample(0)
    own, reference = policy.distribution(batch.obs), policy.reference_distribution(batch.obs)
    kl = ((own.mean - reference.mean) ** 2 / (2 * own.std**2)).sum((1, 2, 3)).detach().numpy()
    pictures = env.unwrapped.model.decode(torch.as_tensor(batch.act[T - 1 :: T])).mean((1, 2, 3)).numpy()
    paid = np.zeros(2 * T)
    paid[T - 1 :: T] = pictures
    assert kl.max() > 0.01
    np.testing.assert_allclose(batch.rew, paid - 0.5 * kl, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(batch.info.kl, kl, rtol=1e-3)


@pytest.mark.parametrize("build", [ddpo_sf, ddpo_is])
def test_steps_that_are_not_whole_episodes(make, build, trained):
    env = make(2)
    algorithm = build(env)
    with pytest.raises(ValueError, match=f"multiple of num_envs \\* {T} steps"):
        trained(
            algorithm,
            TrajectoryCollector(algorithm, env, 4),
            4,
            collection_step_num_episodes=None,
            collection_step_num_env_steps=2 * T + 2,
        )
    for changes in ({}, {"collection_step_num_episodes": None, "collection_step_num_env_steps": 6 * T}):
        with pytest.raises(ValueError, match=f"{3 * T} steps of each env do not fit .* room for {T}; make"):
            trained(algorithm, TrajectoryCollector(algorithm, env, 2), 6, **changes)
