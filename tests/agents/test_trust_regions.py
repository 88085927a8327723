"""GRPO-Guard's normalised ratio and Flow-DPPO's divergence: gradients by hand on two steps, and whose the means are."""

import copy

import numpy as np
import pytest
import torch

from agent_updates import close, gradients, record, rewarded, slope, update
from diffusion_gym.agents.algorithms import DDPOIS, DDPOISKL, DPOK
from diffusion_gym.agents.algorithms.ddpo_is import _step_lengths
from diffusion_gym.agents.losses import masked_surrogate, normalized_surrogate
from diffusion_gym.scheduling import gaussian_kl, gaussian_log_prob

STD, INTERVAL = [0.5, 0.2], [0.3, 0.1]
OLD, THETA = [0.3, -0.2], [0.42, -0.05]
ADVANTAGES = [1.0, -2.0, 0.5, 1.5, -0.7, 0.0]


def transitions():
    """Six transitions at two steps of a policy with mean theta_k x, in float64: steps, x, actions."""
    generator = torch.Generator().manual_seed(4)
    x, z = torch.randn(2, 6, 1, 1, 3, generator=generator, dtype=torch.float64)
    steps = torch.arange(6) % 2
    old = torch.tensor(OLD, dtype=torch.float64)[steps].view(-1, 1, 1, 1)
    std = torch.tensor(STD, dtype=torch.float64)[steps].view(-1, 1, 1, 1)
    return steps, x, old * x + std * z, std


def surrogate(kind, theta, bound):
    steps, x, action, std = transitions()
    old_mean = torch.tensor(OLD, dtype=torch.float64)[steps].view(-1, 1, 1, 1) * x
    mean = theta[steps].view(-1, 1, 1, 1) * x
    log_prob, old = (gaussian_log_prob(action, each, std) for each in (mean, old_mean))
    divergence = gaussian_kl(mean, old_mean, std, "mean")
    advantage = torch.tensor(ADVANTAGES, dtype=torch.float64)
    if kind == "divergence":
        return masked_surrogate(log_prob, old, divergence.detach(), advantage, bound)
    interval = torch.tensor(INTERVAL, dtype=torch.float64)[steps]
    return normalized_surrogate(log_prob, old, divergence, std.flatten(), interval, advantage, bound)


def test_the_gradient_of_the_normalised_ratio_by_hand():
    """It is exp of the mean of z (mu - mu_old), z the noise that was drawn: the divergence has gone."""
    theta = torch.tensor(THETA, dtype=torch.float64, requires_grad=True)
    found = surrogate("normalized", theta, 0.02)
    gradient = torch.autograd.grad(found.loss.sum(), theta)[0]
    steps, x, action, std = (part.numpy() for part in transitions())
    wanted, clipped = np.zeros(2), []
    for k, x_k, a_k, advantage in zip(steps, x, action, ADVANTAGES, strict=True):
        z = (a_k - OLD[k] * x_k) / STD[k]
        ratio = np.exp((z * (THETA[k] - OLD[k]) * x_k).mean())
        outside = (ratio > 1.02 and advantage > 0) or (ratio < 0.98 and advantage < 0)
        wanted[k] += 0 if outside else -advantage * ratio * (z * x_k).mean() / INTERVAL[k]
        clipped.append(float(outside))
    np.testing.assert_allclose(gradient, wanted, rtol=1e-10)
    assert found.clipped.tolist() == clipped and 0 < sum(clipped) < 5


def test_the_gradient_beyond_the_divergence_by_hand():
    theta = torch.tensor(THETA, dtype=torch.float64, requires_grad=True)
    bound = 0.05
    found = surrogate("divergence", theta, bound)
    gradient = torch.autograd.grad(found.loss.sum(), theta)[0]
    steps, x, action, _ = (part.numpy() for part in transitions())
    wanted, stopped, kept = np.zeros(2), [], 0
    for k, x_k, a_k, advantage in zip(steps, x, action, ADVANTAGES, strict=True):
        divergence = ((THETA[k] - OLD[k]) ** 2 * x_k**2).mean() / (2 * STD[k] ** 2)
        log_ratio = -((a_k - THETA[k] * x_k) ** 2 - (a_k - OLD[k] * x_k) ** 2).mean() / (2 * STD[k] ** 2)
        stops = divergence >= bound and log_ratio * advantage > 0
        kept += divergence >= bound and not stops
        slope_k = ((a_k - THETA[k] * x_k) * x_k).mean() / STD[k] ** 2
        wanted[k] += 0 if stops else -advantage * np.exp(log_ratio) * slope_k
        stopped.append(float(stops))
    np.testing.assert_allclose(gradient, wanted, rtol=1e-10)
    assert found.clipped.tolist() == stopped
    assert sum(stopped) > 0 and kept > 0  # what corrects itself goes on beyond the bound


@pytest.mark.parametrize("kind", ["normalized_ratio", "divergence"])
@pytest.mark.parametrize("agent_class", [DDPOIS, DDPOISKL])
def test_the_means_are_those_of_the_policy_that_sampled(make_env, make_agent, roll, kind, agent_class):
    env = make_env(8)
    agent = make_agent(env, agent=agent_class, batch_size=4, trust_region=kind, learning_rate=1e-2)
    before = copy.deepcopy(agent.policy)
    rolled = rewarded(roll(env, agent.policy))
    batches = record(agent)
    metrics = update(agent, rolled)
    assert len(batches) == 2 and metrics["approx_kl"] > 1e-6
    for batch in batches:
        with torch.no_grad():
            torch.testing.assert_close(batch.old_mean, before.distribution(batch.observation).mean)


@pytest.mark.parametrize("kind", ["normalized_ratio", "divergence"])
def test_a_fresh_policy_follows_the_policy_gradient(make_env, make_agent, roll, kind):
    """Of a single update the ratio is 1; the normalised one has the steps' own scale, std over their length."""
    env = make_env(8)
    options = {"batch_size": 8, "max_grad_norm": 1e9, "trust_region": kind}
    agent, other = make_agent(env, **options), make_agent(env)
    rolled = rewarded(roll(env, agent.policy))
    batches = record(agent)
    metrics = update(agent, rolled)
    (batch,) = batches
    assert batch.old_mean is None and metrics["approx_kl"] == 0 and metrics["clip_fraction"] == 0
    gaussian = other.policy.distribution(batch.observation)
    scale = gaussian.std.flatten() / _step_lengths(other.policy.table)[batch.observation["step"]]
    scale = scale if kind == "normalized_ratio" else 1.0
    objective = (batch.advantage * gaussian.log_prob(batch.action) * scale).mean()
    close(-gradients(agent), slope(objective, other.parameters), 1e-4)


def test_steps_are_as_long_as_their_times_are_apart(make_env, make_agent):
    policy = make_agent(make_env(2, num_inference_steps=4)).policy
    times = policy.table.timesteps.double() / 1000
    expected = [a - b for a, b in zip(times.tolist(), [*times.tolist()[1:], 0.0], strict=True)]
    assert _step_lengths(policy.table).tolist() == pytest.approx(expected)
    assert _step_lengths(policy.table).sum().item() == pytest.approx(times[0].item())


def test_what_cannot_be_is_named():
    with pytest.raises(ValueError, match="trust_region='kl' must be one of ratio, normalized_ratio, divergence"):
        DDPOIS.Config(trust_region="kl")
    with pytest.raises(ValueError, match="trust_region='divergence' is not for DPOK"):
        DPOK.Config(trust_region="divergence")
