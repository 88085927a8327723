"""DDPO_SF: REINFORCE on a chain of Gaussians worked by hand, and on the tiny pipeline against autograd."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.distributions import Normal

import agent_updates
from agent_updates import ascent, close, gradients, update, weights
from diffusion_gym.agents.algorithms import DDPOIS, DDPOISKL, DDPOSF
from diffusion_gym.agents.losses import score_function_loss
from diffusion_gym.scheduling import gaussian_log_prob

TRAINABLE = ["lora", "full"]
NUMBER, STEPS = 12, 4

rewarded = partial(agent_updates.rewarded, mean=1.0, spread=3.0)  # rewards whose mean is not 0


# --- a chain of Gaussians --------------------------------------------------------------------------------------

FACTOR, SIGMAS, LENGTH = 0.8, (0.9, 0.5, 0.3), 3
THETA = -0.4
SUM = 1 + FACTOR + FACTOR**2  # how far x_0 moves with theta


def chain(number, dimensions=1):
    """x_T to x_0, `(T + 1, N, D)`, of x_{t-1} ~ N(a x_t + theta, sigma_t^2 I), float64."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(LENGTH + 1, number, dimensions, generator=generator, dtype=torch.float64)
    states = [noise[0]]
    for sigma, fresh in zip(SIGMAS, noise[1:], strict=True):
        states.append(FACTOR * states[-1] + THETA + sigma * fresh)
    return torch.stack(states)


def chain_losses(states, rewards, theta, reduction="sum"):
    """`score_function_loss` of the N * T transitions, `(T, N)`."""
    rows = []
    for step, sigma in enumerate(SIGMAS):
        std = torch.full((states.shape[1], 1), sigma, dtype=torch.float64)
        log_prob = gaussian_log_prob(states[step + 1], FACTOR * states[step] + theta, std, reduction)
        rows.append(score_function_loss(log_prob, rewards))
    return torch.stack(rows)


def scores(states):
    """d/dtheta of sum_t log p, by hand: sum_t (x_{t-1} - a x_t - theta) / sigma_t^2, `(N,)` for one dimension."""
    pairs = zip(states, states[1:], SIGMAS, strict=False)
    return sum((after - FACTOR * before - THETA)[:, 0] / sigma**2 for before, after, sigma in pairs)


def test_its_gradient_is_that_of_the_summed_log_probability_times_the_reward():
    """DDPO, equation (3), by hand and by autograd of torch's own density."""
    states = chain(6)
    rewards = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, -1.0], dtype=torch.float64)
    theta = torch.tensor(THETA, dtype=torch.float64, requires_grad=True)
    (ours,) = torch.autograd.grad(chain_losses(states, rewards, theta).sum(), theta)
    total = sum(
        Normal(FACTOR * states[step] + theta, sigma).log_prob(states[step + 1])[:, 0]
        for step, sigma in enumerate(SIGMAS)
    )
    (autograd,) = torch.autograd.grad((total * rewards).sum(), theta)
    by_hand = (scores(states) * rewards).sum()
    assert abs(by_hand) > 1
    torch.testing.assert_close(-ours, by_hand, rtol=1e-12, atol=0)
    torch.testing.assert_close(-ours, autograd, rtol=1e-12, atol=0)


@pytest.mark.parametrize("reward", ["linear", "quadratic"])
def test_its_mean_is_the_gradient_of_the_expected_reward(reward):
    """x_0 has mean theta (1 + a + a^2), which the expected reward depends on, and a variance that theta leaves."""
    number, target = 300_000, 0.7
    states = chain(number)
    end = states[-1][:, 0]
    if reward == "linear":
        rewards, expected = end, SUM
    else:
        rewards, expected = -((end - target) ** 2), -2 * (THETA * SUM - target) * SUM
    theta = torch.full((number, 1), THETA, dtype=torch.float64, requires_grad=True)  # one a sample, for the spread
    (slopes,) = torch.autograd.grad(-chain_losses(states, rewards, theta).sum(), theta)
    error = slopes.std().item() / number**0.5
    assert error < 0.02 * abs(expected)
    assert abs(slopes.mean().item() - expected) < 4 * error


def test_a_baseline_does_not_change_the_expected_gradient():
    """Advantages instead of rewards: E[score] = 0."""
    number = 300_000
    states = chain(number)
    theta = torch.full((number, 1), THETA, dtype=torch.float64, requires_grad=True)
    ones = torch.ones(number, dtype=torch.float64)
    (slopes,) = torch.autograd.grad(chain_losses(states, ones, theta).sum(), theta)
    assert abs(slopes.mean().item()) < 4 * slopes.std().item() / number**0.5
    assert slopes.std() > 1


@pytest.mark.parametrize("dimensions", [1, 5])
def test_the_mean_over_dimensions_and_steps_only_scales_it(dimensions):
    """The agents take the mean over N * T transitions, by default of log-probabilities that are means over D."""
    states = chain(6, dimensions)
    rewards = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, -1.0], dtype=torch.float64)
    theta = torch.tensor(THETA, dtype=torch.float64, requires_grad=True)
    (whole,) = torch.autograd.grad(chain_losses(states, rewards, theta, "sum").sum(), theta)
    (mean,) = torch.autograd.grad(chain_losses(states, rewards, theta, "mean").mean(), theta)
    torch.testing.assert_close(mean, whole / (6 * LENGTH * dimensions), rtol=1e-12, atol=0)


# --- the agent -------------------------------------------------------------------------------------------------


@pytest.fixture
def env(make_env):
    return make_env(NUMBER)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("trainable", TRAINABLE)
def test_the_agents_gradient_is_the_score_function_estimator(make_env, make_agent, roll, trainable, reduction):
    env = make_env(NUMBER, log_prob_reduction=reduction)
    agent = make_agent(env, trainable, agent=DDPOSF, max_grad_norm=1e9)
    rolled = rewarded(roll(env, agent.policy))
    rewards = rolled.rewards.double().numpy()
    advantages = (rewards - rewards.mean()) / rewards.std()
    expected = ascent(agent, rolled, advantages, reduction=reduction)
    metrics = update(agent, rolled)
    assert expected.norm() > 0.01
    close(-gradients(agent), expected, 1e-4)
    assert metrics["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-4)
    assert (metrics["updates"], metrics["samples_dropped"]) == (1, 0)


def test_the_update_is_one_step_of_adamw(env, make_agent, roll):
    """Up to the sign of the estimator and the learning rate, by torch's own optimiser."""
    agent = make_agent(env, agent=DDPOSF, max_grad_norm=1e9, adam_epsilon=1e-3)
    rolled = rewarded(roll(env, agent.policy))
    rewards = rolled.rewards.double().numpy()
    parameter = torch.nn.Parameter(weights(agent).clone())
    parameter.grad = -ascent(agent, rolled, (rewards - rewards.mean()) / rewards.std())
    torch.optim.AdamW([parameter], lr=1e-3, eps=1e-3, weight_decay=1e-4).step()
    before = weights(agent)
    update(agent, rolled)
    close(weights(agent) - before, parameter.detach() - before, 1e-3)


# normalisations: what an independent NumPy says
NORMALIZATIONS = {
    "none": lambda rewards, prompts: rewards,
    "batch": lambda rewards, prompts: (rewards - np.mean(rewards)) / np.std(rewards),
    "group": lambda rewards, prompts: np.concatenate(
        [(part - np.mean(part)) / np.std(part) for part in np.split(rewards, NUMBER // 4)]
    ),
    "prompt": lambda rewards, prompts: np.array(
        [
            (reward - np.mean(rewards[prompts == prompt])) / np.std(rewards[prompts == prompt])
            for reward, prompt in zip(rewards, prompts, strict=True)
        ]
    ),
}


@pytest.mark.parametrize("agent_class", [DDPOSF, DDPOIS])
@pytest.mark.parametrize("clip", [1e6, 0.8])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_advantages_are_normalised_then_clipped(env, make_agent, roll, agent_class, clip, normalization):
    options = {"group_size": 4, "statistics_min_count": 2, "advantage_clip": clip, "max_grad_norm": 1e9}
    options |= {"normalization": normalization, "batch_size": NUMBER}
    agent = make_agent(env, agent=agent_class, **options)
    rolled = rewarded(roll(env, agent.policy))
    rolled = replace(rolled, prompts=("a", "b", "b", "c") * 3)
    normalised = NORMALIZATIONS[normalization](rolled.rewards.double().numpy(), np.array(rolled.prompts))
    expected = np.clip(normalised, -clip, clip)
    assert (np.abs(normalised) > 0.8).any() and (np.abs(normalised) < 0.8).any()
    np.testing.assert_allclose(agent.advantages(rolled), expected, rtol=1e-9)
    other = make_agent(env, agent=agent_class, **options)
    update(other, rolled)
    close(-gradients(other), ascent(agent, rolled, expected), 2e-4)


@pytest.mark.parametrize("batch_size", [1, 5, NUMBER, 1000])
def test_there_is_one_update_whatever_the_batch_size(env, make_agent, roll, batch_size):
    agent = make_agent(env, agent=DDPOSF, batch_size=batch_size)
    steps = []
    agent.optimizer.adam.register_step_post_hook(lambda *_: steps.append(1))
    rolled = rewarded(roll(env, agent.policy))
    seen = []
    agent.policy.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    assert update(agent, rolled)["updates"] == 1
    assert len(steps) == 1
    assert sorted(torch.cat(seen).flatten(1).tolist()) == sorted(rolled.latents[1:].flatten(0, 1).flatten(1).tolist())


def test_more_inner_epochs_are_more_updates(env, make_agent, roll):
    agent = make_agent(env, agent=DDPOSF, batch_size=4, inner_epochs=3)
    assert DDPOSF.Config().inner_epochs == 1
    assert update(agent, rewarded(roll(env, agent.policy)))["updates"] == 3


def test_the_log_probabilities_of_the_rollout_are_not_used(env, make_agent, roll):
    agent, other = make_agent(env, agent=DDPOSF), make_agent(env, agent=DDPOSF)
    before = weights(agent)
    rolled = rewarded(roll(env, agent.policy))
    update(agent, rolled)
    update(other, replace(rolled, log_probs=rolled.log_probs + 3))
    assert not torch.equal(weights(agent), before)
    assert torch.equal(weights(agent), weights(other))


# --- importance sampling at theta = theta_old ------------------------------------------------------------------


@pytest.mark.parametrize("clip_range", [1e-4, 0.2])
@pytest.mark.parametrize("agent_class, options", [(DDPOIS, {}), (DDPOISKL, {"kl_weight": 0.0})], ids=["is", "iskl"])
@pytest.mark.parametrize("trainable", TRAINABLE)
def test_importance_sampling_begins_as_the_score_function(
    env, make_agent, roll, trainable, agent_class, options, clip_range
):
    """Equation (4) at ratio 1 is equation (3)."""
    shared = {"batch_size": NUMBER, "max_grad_norm": 1e9}
    score = make_agent(env, trainable, agent=DDPOSF, **shared)
    sampling = make_agent(env, trainable, agent=agent_class, clip_range=clip_range, **shared, **options)
    rolled = rewarded(roll(env, score.policy))
    update(score, rolled)
    metrics = update(sampling, rolled)
    assert metrics["clip_fraction"] == 0
    assert gradients(score).norm() > 0.01
    close(gradients(sampling), gradients(score), 1e-5)


@pytest.mark.parametrize("cfg_training", [True, False], ids=["both branches", "conditional branch"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("trainable", TRAINABLE)
def test_the_ratio_is_1_where_the_agent_trains(make_env, make_agent, roll, trainable, guidance, cfg_training):
    """But for the rounding of kernels, which differs by batch and is far inside DDPO's clip range of 1e-4."""
    env = make_env(NUMBER, guidance_scale=guidance)
    agent = make_agent(env, trainable, cfg_training=cfg_training, batch_size=NUMBER, micro_batch_size=7)
    rolled = rewarded(roll(env, agent.policy))
    number = torch.arange(NUMBER)
    for step in range(STEPS):  # the rollout's batches, now with a gradient
        at = torch.full_like(number, step)
        log_prob = agent.policy(rolled.states(number, at), rolled.actions(number, at))
        assert log_prob.requires_grad
        # measured: 3e-6 where the branches are computed one by one, which the rollout does not do
        limit = 1e-6 if cfg_training or guidance == 1 else 1e-5
        assert ((log_prob - rolled.log_probs[step]).exp() - 1).abs().max() <= limit
    ratios, compute = [], agent.losses

    def recorded(batch):
        ratios.append((agent.policy(batch.observation, batch.action) - batch.old_log_prob).detach().exp())
        return compute(batch)

    agent.losses = recorded
    metrics = update(agent, rolled)
    assert torch.cat(ratios).shape == (NUMBER * STEPS,)
    assert (torch.cat(ratios) - 1).abs().max() <= 1e-5  # measured: 3e-6
    assert metrics["approx_kl"] <= 0.5e-10 and metrics["clip_fraction"] == 0
