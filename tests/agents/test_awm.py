"""Advantage Weighted Matching: its gradient worked by hand, its ratios, and whose they are."""

import copy

import numpy as np
import pytest
import torch

from agent_updates import rewarded, update
from diffusion_gym.agents.algorithms import AWM
from toy_policy import BEHAVIOUR, REFERENCE, THETA, arrays, toy_agent, toy_batch

ADVANTAGES = [3.0, -1.0, 4.0, -2.0, 0.5, -3.0]


@pytest.mark.parametrize("prediction", ["flow", "epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("power", "off_policy"), [(0.25, True), (1.0, True), (0.25, False)])
def test_the_gradient_is_the_one_by_hand(prediction, power, off_policy):
    """scxue/advantage_weighted_matching, scripts/train_sd3_awm.py, weighting `ghuber`, `exp_first`."""
    options = {"error_power": power, "clip_range": 0.05, "advantage_weight": 0.2, "kl_weight": 0.3}
    agent = toy_agent(AWM, prediction, behaviour_weight=0.7, off_policy=off_policy, **options)
    batch = toy_batch(agent.policy, ADVANTAGES)
    batch.fixed["reference"] = agent.policy.prediction(batch.observation, reference=True)
    rows = agent.losses(batch)
    found = torch.autograd.grad(rows["loss"].sum(), agent.policy.theta)[0]
    wanted, losses, clipped = np.zeros(2), [], []
    for (k, x, _, target, level, _, _), advantage in zip(arrays(agent.policy, batch), ADVANTAGES, strict=True):

        def likelihood(theta, x=x, target=target, level=level):
            return -level * ((((theta * x - target) ** 2).mean() + 1e-10) ** power - 1e-10**power) / power

        a = 0.2 * advantage
        rho = np.exp(likelihood(THETA[k]) - likelihood((BEHAVIOUR if off_policy else THETA)[k]))
        m = ((THETA[k] * x - target) ** 2).mean() + 1e-10
        slope = -level * m ** (power - 1) * (2 * (THETA[k] * x - target) * x).mean()
        outside = rho > 1.05 if a > 0 else rho < 0.95
        losses.append(-a * (np.clip(rho, 0.95, 1.05) if outside else rho))
        wanted[k] += 0.0 if outside else -a * rho * slope
        clipped.append(outside)
        for weight, other in ((0.3, REFERENCE), (0.7, BEHAVIOUR)):
            losses[-1] += weight * ((THETA[k] - other[k]) ** 2 * x**2).mean()
            wanted[k] += weight * (2 * (THETA[k] - other[k]) * x**2).mean()
    np.testing.assert_allclose(rows["loss"].detach(), losses, rtol=1e-10)
    np.testing.assert_allclose(found, wanted, rtol=1e-9)
    assert rows["clip_fraction"].tolist() == [float(outside) for outside in clipped]
    assert 0 < sum(clipped) < 6 if off_policy else not any(clipped)


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_a_fresh_ratio_is_1(make_env, make_agent, trainable):
    """With one update, and for the first of several."""
    env = make_env(8, num_inference_steps=3, eta=0.0)
    for size in (8, 4):
        agent = make_agent(env, trainable, agent=AWM, batch_size=size, learning_rate=1e-9)
        metrics = update(agent, rewarded(agent.sample(env, 8, (0, 0))))
        assert metrics["updates"] == 8 // size
        assert 0 <= metrics["approx_kl"] < 1e-9 and metrics["clip_fraction"] == 0


@pytest.mark.parametrize("off_policy", [False, True])
def test_ratios_are_to_the_policy_that_sampled(make_env, make_agent, off_policy):
    env = make_env(8, num_inference_steps=3, eta=0.0)
    options = {"batch_size": 4, "learning_rate": 1e-2, "behaviour_growth": 0.1, "off_policy": off_policy}
    agent = make_agent(env, "full", agent=AWM, **options)
    update(agent, rewarded(agent.sample(env, 8, (0, 0))))
    with agent.behaviour.applied() if off_policy else torch.no_grad():
        old = copy.deepcopy(agent.policy)
    seen, losses = [], agent.losses
    agent.losses = lambda batch: seen.append((batch, losses(batch))) or seen[-1][1]
    update(agent, rewarded(agent.sample(env, 8, (0, 1))))
    assert len(seen) == 2
    for batch, _ in seen:
        with torch.no_grad():
            expected = agent.log_likelihood(old.prediction(batch.observation), batch)
        found = agent.log_likelihood(batch.fixed["behaviour"], batch) if off_policy else batch.fixed["log_prob"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert seen[-1][1]["approx_kl"].mean() > 1e-6


def test_the_defaults_are_those_of_the_authors():
    config = AWM.Config()
    assert (config.error_power, config.clip_range, config.kl_weight, config.behaviour_weight) == (0.25, 1.0, 1e-3, 1.0)
    assert (config.behaviour_decay, config.behaviour_growth, config.advantage_weight) == (0.3, 1e-3, 0.2)
