"""`CFGUNetPolicy`: the distribution, values, micro-batches."""

import numpy as np
import pytest
import torch

pytest.importorskip("stable_baselines3")
from stable_baselines3 import A2C, PPO
from torch.distributions import Normal

from diffusion_gym.agents.sb3 import (
    CFGUNetPolicy,
    SB3VecEnv,
    ddpo_is,
    ddpo_sf,
    policy_kwargs,
)

T = 3


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_policy_is_the_samplers_gaussian(make_env, perturb, reduction, observed):
    env = make_env(6, num_inference_steps=T, log_prob_reduction=reduction)
    policy = ddpo_is(env).policy
    perturb(policy.actor)
    states = observed(env)
    known = policy.actor.distribution(states)
    gaussian = Normal(known.mean, known.std.expand_as(known.mean))
    assert torch.equal(known.std.flatten(), policy.actor.table.sigma[torch.arange(6) % T])
    actions, values, log_probs = policy(states)
    reduced = {"mean": lambda x: x.flatten(1).mean(1), "sum": lambda x: x.flatten(1).sum(1)}[reduction]
    torch.testing.assert_close(log_probs, reduced(gaussian.log_prob(actions)), rtol=1e-5, atol=1e-5)
    assert values.shape == (6, 1) and not values.any() and actions.shape == (6, 4, 4, 4)
    values, again, entropies = policy.evaluate_actions(states, actions.flatten(1))  # flat, as SB3's buffers keep them
    torch.testing.assert_close(again, log_probs, rtol=0, atol=1e-6)
    torch.testing.assert_close(entropies, reduced(gaussian.entropy()), rtol=1e-5, atol=1e-5)
    assert values.shape == (6, 1) and not entropies.requires_grad
    torch.testing.assert_close(policy(states, deterministic=True)[0], known.mean)
    torch.testing.assert_close(policy.get_distribution(states).mean, known.mean)


def test_samples_have_the_samplers_noise(make_env, observed):
    env = make_env(2, num_inference_steps=T)
    policy = ddpo_is(env).policy
    states = {key: value[:1].expand(4000, *value.shape[1:]) for key, value in observed(env).items()}
    with torch.no_grad():
        known = policy.actor.distribution(observed(env))
        noise = (policy(states)[0] - known.mean[:1]) / known.std[0]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_predict_takes_one_state_or_many_and_clips_nothing(make_env, make_single, observed):
    env, single = make_env(2, num_inference_steps=T), make_single()
    model = ddpo_is(env)
    state, _ = single.reset(seed=0)
    action, nothing = model.predict(state, deterministic=True)
    expected = model.policy.actor.distribution({key: value[None] for key, value in state.items()}).mean[0]
    assert nothing is None and action.dtype == np.float32
    np.testing.assert_allclose(action, expected.detach().numpy(), rtol=1e-5, atol=1e-6)
    far = {**observed(env), "latents": torch.full((2, 4, 4, 4), 30.0)}  # ten times what a latent ever is
    with torch.no_grad():
        free = model.policy.actor.distribution(far).mean.numpy()
    assert np.abs(free).max() > 20
    np.testing.assert_array_equal(model.predict(far, deterministic=True)[0], free)
    assert all(parameter.grad is None for parameter in model.policy.parameters())


def test_the_name_is_known_to_sb3(make_env):
    for algorithm in (PPO, A2C):
        env = SB3VecEnv(make_env(2, num_inference_steps=T))
        model = algorithm("CFGUNetPolicy", env, n_steps=T, policy_kwargs=policy_kwargs(env, lora_rank=2))
        assert isinstance(model.policy, CFGUNetPolicy) and model.policy.actor.lora_rank == 2
    assert type(ddpo_is(make_env(2))) is PPO and type(ddpo_sf(make_env(2))) is A2C


def test_value_network_is_learned(make_env, observed):
    env = make_env(4, num_inference_steps=T)
    model = ddpo_is(env, vf_coef=0.5, learning_rate=1e-2, policy_kwargs={"value_network": True})
    states = observed(env)
    before = model.policy.predict_values(states).detach()
    assert before.shape == (4, 1) and before.std() > 0
    model.learn(4 * T)
    assert not torch.allclose(before, model.policy.predict_values(states))


def test_micro_batches_give_the_same_gradient(make_env, perturb, observed):
    env = make_env(6, num_inference_steps=T)
    policy = ddpo_is(env, policy_kwargs={"value_network": True}, vf_coef=0.5).policy
    perturb(policy.actor)
    states, actions = observed(env), torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    gradients = []
    for policy.micro_batch_size in (0, 4):
        values, log_probs, entropies = policy.evaluate_actions(states, actions)
        assert values.shape == (6, 1) and log_probs.shape == entropies.shape == (6,)
        policy.zero_grad()
        (values.sum() + (log_probs * torch.arange(6)).sum()).backward()
        gradients.append([p.grad.clone() for p in policy.parameters() if p.requires_grad])
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() <= 1e-4 * one.norm() + 1e-6
