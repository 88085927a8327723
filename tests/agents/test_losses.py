"""The clipped surrogate against hand calculations, Stable-Baselines3's formula and REINFORCE.

The score-function loss by hand, and the KL penalties against torch.distributions.
"""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from diffusion_gym.agents.distribution import DenoisingDistribution
from diffusion_gym.agents.losses import clipped_surrogate, kl_penalty, score_function_loss, with_kl_penalty
from diffusion_gym.wrappers.kl_penalty import divergence


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


# --- the score-function loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize("advantage, log_prob, loss", [(2.0, -3.0, 6.0), (-0.5, -3.0, -1.5), (0.0, -3.0, 0.0)])
def test_the_score_function_loss_by_hand(advantage, log_prob, loss):
    log_prob = torch.tensor([log_prob], requires_grad=True)
    result = score_function_loss(log_prob, torch.tensor([advantage]))
    assert result.tolist() == [loss]
    assert torch.autograd.grad(result.sum(), log_prob)[0].tolist() == [-advantage]


# --- the KL penalties ------------------------------------------------------------------------------------------

NUMBER, SHAPE = 5, (2, 3, 4)
FORMS = ["squared_log_ratio", "closed_form", "unscaled"]


@pytest.fixture
def gaussians():
    """Means of the policy, with gradient, and of the reference, their std and actions of the policy, float64."""
    generator = torch.Generator().manual_seed(0)
    mean, other, noise = torch.randn(3, NUMBER, *SHAPE, generator=generator, dtype=torch.float64)
    std = torch.linspace(0.05, 3, NUMBER, dtype=torch.float64).view(-1, 1, 1, 1)
    return mean.requires_grad_(), mean.detach() + 0.3 * other, std, mean.detach() + std * noise


def penalty(gaussians, form, reduction):
    mean, other, std, action = gaussians
    policy, reference = (DenoisingDistribution(value, std, reduction) for value in (mean, other))
    return kl_penalty(policy, reference, action, form)


def by_torch(gaussians, form, reduction):
    """The same by torch.distributions."""
    mean, other, std, action = gaussians
    policy, reference = Normal(mean, std), Normal(other, std)

    def reduced(value):
        return value.flatten(1).sum(1) / (math.prod(SHAPE) if reduction == "mean" else 1)

    if form == "squared_log_ratio":
        nats = (policy.log_prob(action) - reference.log_prob(action)).flatten(1).sum(1)
        return reduced(0.5 * nats[:, None] ** 2)
    divergence = kl_divergence(policy, reference)
    return reduced(divergence if form == "closed_form" else divergence * 2 * std**2)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("form", FORMS)
def test_penalties_and_their_gradients_are_those_of_torch_distributions(gaussians, form, reduction):
    ours, theirs = (function(gaussians, form, reduction) for function in (penalty, by_torch))
    assert ours.shape == (NUMBER,) and (ours > 1e-6).all()
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)
    slopes = [torch.autograd.grad(value.sum(), gaussians[0])[0] for value in (ours, theirs)]
    torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-15)
    assert (slopes[0].flatten(1).norm(dim=1) > 1e-5).all()


def test_the_divergence_per_dimension_is_the_whole_one_divided_by_their_number(gaussians):
    mean, other, std, _ = gaussians
    whole = kl_divergence(Normal(mean, std), Normal(other, std)).flatten(1).sum(1)
    torch.testing.assert_close(penalty(gaussians, "closed_form", "sum"), whole, rtol=1e-9, atol=0)
    torch.testing.assert_close(penalty(gaussians, "closed_form", "mean"), whole / 24, rtol=1e-9, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(1, 2, 2), (4, 64, 64)])
def test_the_weight_of_the_divergence_is_in_advantages_a_nat_everywhere(shape, reduction):
    """In the loss of each form and in the reward of the wrapper, for any number of dimensions."""
    weight, generator = 0.3, torch.Generator().manual_seed(0)
    mean, other, noise = torch.randn(3, NUMBER, *shape, generator=generator, dtype=torch.float64)
    std = torch.linspace(0.05, 3, NUMBER, dtype=torch.float64).view(-1, 1, 1, 1)
    mean = (other + 1e-2 * std * mean).requires_grad_()
    action = mean.detach() + std * noise
    policy, reference = (DenoisingDistribution(value, std, reduction) for value in (mean, other))

    class Referenced:
        def distribution(self, observation):
            return policy

        def reference_distribution(self, observation):
            return reference

    def slope(loss):
        return torch.autograd.grad(loss.sum(), mean, retain_graph=True)[0]

    def in_the_loss(form):
        nothing = {"loss": torch.zeros(NUMBER, dtype=torch.float64)}
        rows = with_kl_penalty(nothing, policy, reference, action, form, weight)
        return slope(rows["loss"]), rows["kl_penalty"]

    penalties = {name: divergence(Referenced(), {}, action, name) for name in ("sampled", "exact")}
    # Sample by sample, the score function of the wrapper's reward is the gradient of the replication's penalty.
    of_the_reward = slope(score_function_loss(policy.log_prob(action), -weight * penalties["sampled"]))
    of_the_loss, measured = in_the_loss("squared_log_ratio")
    torch.testing.assert_close(of_the_loss, of_the_reward, rtol=1e-6, atol=0)
    torch.testing.assert_close(measured, penalties["sampled"] ** 2 / 2, rtol=1e-6, atol=0)
    # The closed form is its expectation, (mean - other) / std^2 a dimension, scaled as log-probabilities are.
    size = math.prod(shape) if reduction == "mean" else 1
    of_the_loss, measured = in_the_loss("closed_form")
    torch.testing.assert_close(of_the_loss, weight * ((mean - other) / std**2).detach() / size, rtol=1e-9, atol=0)
    torch.testing.assert_close(measured, penalties["exact"], rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "form, expected, slope",
    [
        # mu = 1, mu_ref = 0.5, sigma = 2, a = 3: l - l_ref = (2.5^2 - 2^2) / 8 = 0.28125, dl/dmu = (3 - 1) / 4
        ("squared_log_ratio", 0.28125**2 / 2, 0.28125 * 0.5),
        ("closed_form", 0.25 / 8, 0.5 / 4),
        ("unscaled", 0.25, 1.0),
    ],
)
def test_penalties_by_hand(form, expected, slope):
    def one(value):
        return torch.full((1, 1, 1, 1), value, dtype=torch.float64)

    mean = one(1.0).requires_grad_()
    value = penalty((mean, one(0.5), one(2.0), one(3.0)), form, "sum")
    assert value.item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.grad(value, mean)[0].item() == pytest.approx(slope, rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_penalties_of_the_reference_itself_are_0(gaussians, form):
    mean, _, std, action = gaussians
    value = penalty((mean, mean.detach(), std, action), form, "sum")
    assert value.tolist() == [0] * NUMBER
    assert not torch.autograd.grad(value.sum(), mean)[0].any()


@pytest.mark.parametrize("form", FORMS)
def test_a_deterministic_step_has_no_penalty(gaussians, form):
    mean, other, std, action = gaussians
    std = torch.where(torch.arange(NUMBER).view(-1, 1, 1, 1) == 1, 0.0, std)
    value = penalty((mean, other, std, action), form, "sum")
    assert value[1] == 0 and (value[[0, 2, 3, 4]] > 0).all()
    slope = torch.autograd.grad(value.sum(), mean)[0]
    assert not slope[1].any() and slope.isfinite().all()


def test_the_squared_log_ratio_follows_the_gradient_of_the_divergence():
    """With actions of the policy its expected gradient, E[(l - l_ref) grad l], is that of KL(policy || reference)."""
    generator = torch.Generator().manual_seed(0)
    number, std = 400_000, torch.tensor(0.7, dtype=torch.float64)
    mean = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(kl_divergence(Normal(mean, std), Normal(torch.zeros_like(mean), std)), mean)
    means = mean.detach().expand(number, 1, 1, 1).clone().requires_grad_()
    action = means.detach() + std * torch.randn(number, 1, 1, 1, generator=generator, dtype=torch.float64)
    stds = std.expand(number, 1, 1, 1)
    value = penalty((means, torch.zeros_like(action), stds, action), "squared_log_ratio", "sum")
    (slopes,) = torch.autograd.grad(value.sum(), means)
    error = slopes.std() / number**0.5
    assert error < 0.01 * expected
    assert abs(slopes.mean() - expected) < 4 * error


@pytest.mark.parametrize("form", ["kl", "", None, "CLOSED_FORM"])
def test_an_unknown_penalty_names_the_argument(gaussians, form):
    with pytest.raises(ValueError, match=f"kl_form={form!r} must be one of squared_log_ratio, closed_form, unscaled"):
        penalty(gaussians, form, "sum")
