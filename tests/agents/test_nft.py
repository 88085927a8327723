"""DiffusionNFT: its gradient worked by hand, and what it is at the begin of an iteration."""

import numpy as np
import pytest
import torch

from agent_updates import close, gradients, rewarded, slope, update
from diffusion_gym.agents.algorithms import NFT
from toy_policy import BEHAVIOUR, REFERENCE, THETA, arrays, toy_agent, toy_batch

ADVANTAGES = [3.0, -1.0, 7.0, -9.0, 0.0, 1.5]  # the third and fourth beyond the clip


@pytest.mark.parametrize("prediction", ["flow", "epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_the_gradient_is_the_one_by_hand(prediction, beta):
    """NVlabs/DiffusionNFT, scripts/train_nft_sd3.py, with a = x_t coefficient and b = prediction's in x_0^."""
    agent = toy_agent(NFT, prediction, mixture=beta, kl_weight=0.3, advantage_clip=5.0)
    batch = toy_batch(agent.policy, ADVANTAGES)
    rows = agent.losses(batch)
    found = torch.autograd.grad(rows["loss"].sum(), agent.policy.theta)[0]
    wanted, losses = np.zeros(2), []
    for (k, x, clean, _, _, a, b), advantage in zip(arrays(agent.policy, batch), ADVANTAGES, strict=True):
        r = np.clip(advantage / 5, -1, 1) / 2 + 0.5
        old, new = a * x + b * BEHAVIOUR[k] * x, a * x + b * THETA[k] * x
        loss = slope_k = 0.0
        for share, sign in ((r, 1), (1 - r, -1)):
            error = (1 - sign * beta) * old + sign * beta * new - clean
            scale = np.abs(error).mean()
            loss += share * (error**2).mean() / scale * 5 / beta
            slope_k += share * (2 * error * sign * beta * b * x).mean() / scale * 5 / beta
        losses.append(loss + 0.3 * ((THETA[k] - REFERENCE[k]) ** 2 * x**2).mean())
        wanted[k] += slope_k + 0.3 * (2 * (THETA[k] - REFERENCE[k]) * x**2).mean()
    np.testing.assert_allclose(rows["loss"].detach(), losses, rtol=1e-12)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_at_the_behaviour_policy_it_is_regression_weighted_by_advantage(make_env, make_agent, trainable):
    """There x+ = x- = x_old, so that the two gradients differ in sign alone: 2r - 1 = A / c, and beta cancels."""
    env = make_env(8, num_inference_steps=3, eta=0.0)
    options = {"agent": NFT, "batch_size": 8, "kl_weight": 0.0, "max_grad_norm": 1e9, "learning_rate": 1e-9}
    agent = make_agent(env, trainable, mixture=0.5, **options)
    rolled = rewarded(agent.sample(env, 8, (0, 0)))
    seen, losses = [], agent.losses
    agent.losses = lambda batch: seen.append(batch) or losses(batch)
    update(agent, rolled)
    (batch,) = seen
    policy = agent.policy
    estimate, _ = policy.estimates(policy.prediction(batch.observation), batch.observation)
    error = (estimate - batch.clean).flatten(1)
    weighted = batch.advantage * error.square().mean(1) / error.detach().abs().mean(1)
    assert len(batch.advantage) == 24 and len(batch.advantage.unique()) == 8
    close(gradients(agent), slope(weighted.mean(), agent.parameters), 1e-4)


def test_an_option_out_of_its_range_is_named():
    with pytest.raises(ValueError, match="mixture=0.0 must be larger than 0"):
        NFT.Config(mixture=0.0)
    with pytest.raises(ValueError, match="behaviour_decay=1.0 must be at least 0 and less than 1"):
        NFT.Config(behaviour_decay=1.0)
