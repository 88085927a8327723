"""The clipped surrogate against hand calculations, Stable-Baselines3's formula and REINFORCE."""

import math

import pytest
import torch

from diffusion_gym.agents.losses import clipped_surrogate


def surrogate(ratios, advantages, clip_range=0.1, old=-1.3):
    """The surrogate for given ratios, and the gradient of the summed loss by the log-probabilities."""
    old_log_prob = torch.full((len(ratios),), old, dtype=torch.float64)
    log_prob = (old_log_prob + torch.tensor(ratios, dtype=torch.float64).log()).requires_grad_()
    result = clipped_surrogate(log_prob, old_log_prob, torch.tensor(advantages, dtype=torch.float64), clip_range)
    (gradient,) = torch.autograd.grad(result.loss.sum(), log_prob)
    return result, gradient


@pytest.mark.parametrize(
    "ratio, advantage, loss, gradient, clipped",
    [
        # d ratio / d log_prob = ratio, so a free branch has gradient -advantage * ratio
        (1.2, 1.0, -1.1, 0.0, 1),  # good action, already more likely: no further
        (0.8, 1.0, -0.8, -0.8, 0),  # good action that became less likely: full pull
        (1.2, -1.0, 1.2, 1.2, 0),  # bad action that became more likely: full push
        (0.8, -1.0, 0.9, 0.0, 1),  # bad action, already less likely: no further
        (1.05, 2.0, -2.1, -2.1, 0),  # inside the range nothing is clipped
        (0.95, -3.0, 2.85, 2.85, 0),
        (1.2, 0.0, 0.0, 0.0, 0),
    ],
)
def test_by_hand(ratio, advantage, loss, gradient, clipped):
    result, slope = surrogate([ratio], [advantage])
    assert result.loss.item() == pytest.approx(loss, abs=1e-12)
    assert slope.item() == pytest.approx(gradient, abs=1e-12)
    assert result.clipped.item() == clipped
    assert result.ratio.item() == pytest.approx(ratio)
    assert result.approx_kl.item() == pytest.approx(math.log(ratio) ** 2 / 2)


def test_the_gradient_is_exactly_zero_where_clipped():
    _, gradient = surrogate([1.2, 0.8, 5.0, 0.01], [1.0, -1.0, 3.0, -3.0])
    assert gradient.tolist() == [0.0] * 4


@pytest.mark.parametrize("clip_range", [1e-4, 0.2])
def test_the_mean_loss_and_gradient_are_those_of_stable_baselines3(clip_range):
    generator = torch.Generator().manual_seed(0)
    old_log_prob, change, advantages = torch.randn(3, 200, generator=generator, dtype=torch.float64)
    results = []
    for ours in (True, False):
        log_prob = (old_log_prob + clip_range * change).requires_grad_()
        if ours:
            result = clipped_surrogate(log_prob, old_log_prob, advantages, clip_range)
            loss, fraction = result.loss.mean(), result.clipped.double().mean()
        else:  # stable_baselines3/ppo/ppo.py, train()
            ratio = torch.exp(log_prob - old_log_prob)
            policy_loss_1 = advantages * ratio
            policy_loss_2 = advantages * torch.clamp(ratio, 1 - clip_range, 1 + clip_range)
            loss = -torch.min(policy_loss_1, policy_loss_2).mean()
            outside = (torch.abs(ratio - 1) > clip_range) & (advantages * (ratio - 1) > 0)
            fraction = outside.double().mean()
        results.append((loss, torch.autograd.grad(loss, log_prob)[0], fraction))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    assert 0.05 < results[0][2] < 0.5


def test_at_ratio_1_the_gradient_is_that_of_reinforce():
    generator = torch.Generator().manual_seed(0)
    parameter = torch.randn(50, generator=generator, dtype=torch.float64).requires_grad_()
    advantages = torch.randn(50, generator=generator, dtype=torch.float64)
    log_prob = torch.sin(parameter) * parameter**2
    loss = clipped_surrogate(log_prob, log_prob.detach(), advantages, 1e-4).loss.sum()
    (gradient,) = torch.autograd.grad(loss, parameter, retain_graph=True)
    (reinforce,) = torch.autograd.grad(-(advantages * log_prob).sum(), parameter)
    torch.testing.assert_close(gradient, reinforce, rtol=1e-12, atol=0)


def test_only_the_loss_carries_a_gradient():
    log_prob = torch.zeros(3, requires_grad=True)
    result = clipped_surrogate(log_prob, torch.zeros(3), torch.ones(3), 0.1)
    assert result.loss.requires_grad
    assert not any(value.requires_grad for value in (result.ratio, result.clipped, result.approx_kl))
