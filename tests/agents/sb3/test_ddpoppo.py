"""`DDPOPPO` and `TrajectoryBuffer`: what SB3's PPO lacks."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("stable_baselines3")

from diffusion_gym.agents.sb3 import TrajectoryBuffer, ddpo_is
from diffusion_gym.agents.sb3.ddpo import NativeUpdate
from diffusion_gym.envs.spaces import make_spaces
from diffusion_gym.wrappers import KLPenaltyVectorEnv

T = 3


def test_buffer_holds_what_sb3s_holds_in_half_the_room(make_env, rolled):
    models, samples = [], []
    for own in ({"rollout_buffer_class": TrajectoryBuffer, "rollout_buffer_kwargs": {"horizon": T}}, {}):
        options = {"n_steps": 2 * T, "seed": 4, "gamma": 0.9, "gae_lambda": 0.7, "vf_coef": 0.5}
        model = ddpo_is(make_env(2, num_inference_steps=T), **options, **own, policy_kwargs={"value_network": True})
        (sample,) = rolled(model).get(None)
        models.append(model)
        samples.append((sample, torch.argsort(sample.old_log_prob)))  # each has its own order
    ours, theirs = models
    (one, order), (other, order_) = samples
    assert len(order) == 2 * 2 * T and one.old_log_prob.unique().numel() == len(order)
    for name in ("old_values", "old_log_prob", "advantages", "returns"):
        torch.testing.assert_close(getattr(one, name)[order], getattr(other, name)[order_], rtol=1e-5, atol=1e-6)
    assert torch.equal(one.actions.flatten(1)[order], other.actions[order_])
    for key in ("prompt", "timestep", "latents"):
        assert torch.equal(one.observations[key][order], other.observations[key][order_]), key
    buffer, reference = ours.rollout_buffer, theirs.rollout_buffer
    assert buffer.latents.numel() == 2 * 2 * (T + 1) * 64  # theirs: 2 * 2 * T states and as many actions
    assert reference.observations["latents"].size + reference.actions.size == 2 * (2 * 2 * T * 64)
    assert buffer.tokens.shape[0] == 2 * 2 and reference.observations["prompt"].shape[0] == 2 * 2 * T
    ours.learn(2 * 2 * T)  # SB3's own train reads it


def test_buffer_refuses_other_rollouts(make_env):
    env = make_env(2, num_inference_steps=T)
    spaces = make_spaces(env.unwrapped.model)
    with pytest.raises(ValueError, match="n_steps=4 must be a multiple of T=3"):
        TrajectoryBuffer(4, *spaces, "cpu", horizon=T, n_envs=2)
    buffer = TrajectoryBuffer(T, *spaces, "cpu", horizon=T, n_envs=2)
    observation, _ = env.reset(seed=0)
    rest = (np.zeros(2), np.ones(2), torch.zeros(2, 1), torch.zeros(2))
    buffer.add(observation, np.ones((2, 4, 4, 4), np.float32), *rest)
    with pytest.raises(ValueError, match="all envs must begin together"):
        buffer.add(observation, np.ones((2, 4, 4, 4), np.float32), *rest)
    rest = (np.zeros(2), np.zeros(2), torch.zeros(2, 1), torch.zeros(2))
    with pytest.raises(ValueError, match="is not the action before it; take the wrapper off that clips"):
        buffer.add(observation, np.ones((2, 4, 4, 4), np.float32), *rest)


@pytest.mark.parametrize("algorithm", ["ddpo_is", "DDPOPPO"])
def test_step_rewards_become_rewards_to_go(make_env, perturb, algorithm, ddpo, rolled):
    """With the KL wrapper A_t = r - beta (KL_t + ... + KL_T)."""
    env = KLPenaltyVectorEnv(make_env(2, num_inference_steps=T), policy=None, beta=0.01, estimator="exact")
    make = {
        "ddpo_is": lambda env: ddpo_is(env, seed=0),
        "DDPOPPO": lambda env: ddpo(env, normalization="none", advantage_clip=1e9),
    }[algorithm]
    model = make(env)
    env.policy = perturb(model.policy.actor, 0.3)
    buffer = rolled(model)
    if algorithm == "DDPOPPO":
        advantages = torch.as_tensor(NativeUpdate(model, model.config).advantages(buffer.trajectories()))
        latents, tokens = buffer.latents, buffer.tokens
    else:
        advantages = torch.as_tensor(buffer.advantages)
        observations = {key: torch.as_tensor(value) for key, value in buffer.observations.items()}
        last = torch.as_tensor(buffer.actions[-1]).view(1, 2, 4, 4, 4)
        latents, tokens = torch.cat([observations["latents"], last]), observations["prompt"][0]
    kl = torch.stack(
        [
            model.policy.actor.distribution(states).kl(model.policy.actor.reference_distribution(states)).detach()
            for states in (model.policy.actor.observation(latents[step], step, tokens) for step in range(T))
        ]
    )
    images = env.unwrapped.model.decode(latents[-1]).mean((1, 2, 3))
    assert kl.min() > 0.01 and advantages.shape == (T, 2)
    for step in range(T):
        expected = images - 0.01 * kl[step:].sum(0)
        torch.testing.assert_close(advantages[step], expected, rtol=1e-4, atol=1e-5)
    if algorithm == "DDPOPPO":
        model.learn(2 * T)
        model = ddpo(env)
        env.policy = perturb(model.policy.actor, 0.3)
        with pytest.raises(ValueError, match="normalization='prompt' is for a reward at the end"):
            model.learn(2 * T)


def test_samples_whose_reward_failed_are_left_out(make_env, perturb, ddpo):
    def sometimes(images, prompts, metadata):
        scores = images.mean((1, 2, 3))
        scores[1] = float("nan")
        return scores

    model = ddpo(make_env(4, num_inference_steps=T, reward=sometimes), learning_rate=1e-2)
    model.learn(4 * T)
    assert all(torch.isfinite(value).all() for value in model.policy.state_dict().values())
    assert model.logger.name_to_value["train/samples_dropped"] == 1
    with pytest.raises(RuntimeError, match="all 2 rewards of the iteration are NaN or infinite"):
        ddpo(make_env(2, num_inference_steps=T, reward=lambda images, *_: images.mean((1, 2, 3)) * math.nan)).learn(1)


def test_target_kl_stops_before_the_step(make_env, perturb, ddpo):
    model = ddpo(make_env(4, num_inference_steps=T), target_kl=1e-9, n_epochs=5, learning_rate=1e-2, batch_size=2 * T)
    model.learn(4 * T)
    taken = [int(row["step"]) for row in model.policy.optimizer.state_dict()["state"].values()]
    assert set(taken) == {1}  # the first update is at ratio 1, the second is stopped
