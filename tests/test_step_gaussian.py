"""The Gaussian of a step: degenerate steps, predictions, guidance, clamping, densities; by hand and by torch."""

import math

import pytest
import torch
from diffusers import DDIMScheduler
from torch.distributions import Normal, kl_divergence

from diffusion_gym import SamplerConfig
from diffusion_gym.models.schedulers import step_table
from diffusion_gym.scheduling import gaussian_kl, gaussian_log_prob, guide, predict_x0, step_gaussian

PREDICTIONS = ["epsilon", "v_prediction", "sample"]


def scheduler_config(**changes):
    """A noise schedule of Stable Diffusion's kind, sampled at 801, 601, 401, 201 and 1."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return {**betas, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, **changes}


def states_and_outputs(count):
    return torch.randn(2, count, 4, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mul(1.5)


# --- degenerate steps ------------------------------------------------------------------------------------------


def last_step_deterministic(sampler="ddim", **options):
    """A table of 5 steps whose last has sigma = 0."""
    config = scheduler_config(set_alpha_to_one=True, steps_offset=0)
    return step_table(config, SamplerConfig(num_inference_steps=5, sampler=sampler, **options))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_deterministic_step_has_log_prob_0_and_no_gradient(sampler):
    table = last_step_deterministic(sampler)
    assert (table.sigma > 0).tolist() == [True] * 4 + [False]
    x, output = states_and_outputs(5)
    output.requires_grad_()
    mean, std = step_gaussian(table, torch.arange(5), x, output)
    action = mean.detach() + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    log_prob = gaussian_log_prob(action, mean, std)
    assert log_prob[-1] == 0 and (log_prob[:-1] != 0).all()
    (gradient,) = torch.autograd.grad(log_prob.sum(), output)
    assert gradient.isfinite().all()
    assert (gradient[-1] == 0).all() and (gradient[:-1] != 0).all()


@pytest.mark.parametrize("denominator", [True, False])
def test_a_deterministic_step_has_kl_0_and_no_gradient(denominator):
    mean = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    std = torch.tensor([[0.5], [0.0], [0.0]], dtype=torch.float64)
    kl = gaussian_kl(mean, mean.detach() + 1, std, denominator=denominator)
    assert kl[0] > 0 and kl[1:].tolist() == [0, 0]
    (gradient,) = torch.autograd.grad(kl.sum(), mean)
    assert gradient.isfinite().all()
    assert (gradient[0] != 0).all() and (gradient[1:] == 0).all()


def test_an_action_far_off_a_deterministic_mean_changes_nothing():
    std, mean = torch.zeros(1, 1), torch.zeros(1, 2, requires_grad=True)
    log_prob = gaussian_log_prob(torch.tensor([[1e30, -1e30]]), mean, std)
    (gradient,) = torch.autograd.grad(log_prob.sum(), mean)
    assert log_prob.item() == 0 and gradient.tolist() == [[0, 0]]


def test_eta_0_makes_every_step_deterministic():
    table = step_table(scheduler_config(), SamplerConfig(num_inference_steps=5, eta=0.0))
    assert table.sigma.tolist() == [0.0] * 5


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("offset", [0, 1])
def test_a_step_is_deterministic_or_has_a_sigma_that_float32_can_score(sampler, spacing, offset):
    """A sigma of 1e-10 is noise that no float32 latent of size 1 can hold: such a step is deterministic."""
    config = scheduler_config(timestep_spacing=spacing, steps_offset=offset)
    table = step_table(config, SamplerConfig(num_inference_steps=20, sampler=sampler))
    assert ((table.sigma == 0) | (table.sigma > 1e-4)).all(), table.sigma.tolist()


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("floor", [1e-3, 0.1, 2.0])
def test_sigma_min_floors_sigma_and_leaves_the_mean(sampler, floor):
    plain, floored = last_step_deterministic(sampler), last_step_deterministic(sampler, sigma_min=floor)
    assert floored.sigma.tolist() == [max(sigma, floor) for sigma in plain.sigma.tolist()]
    x, output = states_and_outputs(5)
    mean, _ = step_gaussian(plain, torch.arange(5), x, output)
    floored_mean, std = step_gaussian(floored, torch.arange(5), x, output)
    assert torch.equal(mean, floored_mean)
    action = mean + 0.3
    expected = Normal(mean, std.expand_as(mean)).log_prob(action).mean((1, 2, 3))
    torch.testing.assert_close(gaussian_log_prob(action, floored_mean, std), expected)


# --- prediction, guidance, clamping ----------------------------------------------------------------------------


@pytest.mark.parametrize("alpha_bar", [0.9991, 0.5, 0.0047])
def test_the_three_predictions_stand_for_the_same_x0_and_noise(alpha_bar):
    """Noising is x_t = sqrt(a) x0 + sqrt(1-a) eps; v = sqrt(a) eps - sqrt(1-a) x0 (arXiv:2202.00512, appendix D)."""
    x0, eps = states_and_outputs(3)
    signal, noise = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    outputs = {"epsilon": eps, "sample": x0, "v_prediction": signal * eps - noise * x0}
    for prediction, output in outputs.items():
        found = predict_x0(output, signal * x0 + noise * eps, signal, noise, prediction)
        torch.testing.assert_close(found[0], x0, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found[1], eps, rtol=1e-10, atol=1e-10)


def test_an_unknown_prediction_is_named():
    with pytest.raises(ValueError, match="prediction='score' must be one of epsilon, sample, v_prediction, flow"):
        predict_x0(torch.zeros(1), torch.zeros(1), torch.ones(1), torch.zeros(1), "score")


def test_a_velocity_stands_for_x0_and_noise():
    x0, eps = states_and_outputs(3)
    for t in (0.001, 0.4, 0.999):
        found = predict_x0(eps - x0, (1 - t) * x0 + t * eps, 1 - t, t, "flow")
        torch.testing.assert_close(found, (x0, eps), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "scale, expected",
    [(0.0, [3.0, -1.0, 0.0]), (1.0, [1.0, 2.0, 4.0]), (5.0, [-7.0, 14.0, 20.0]), (0.5, [2.0, 0.5, 2.0])],
)
def test_guidance_by_hand(scale, expected):
    conditional, unconditional = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([3.0, -1.0, 0.0])
    assert guide(conditional, unconditional, scale).tolist() == expected  # w c + (1 - w) u


def clamped_everywhere_but_one(prediction):
    """A state and output at step 1 of 5 whose x0 is within [-1, 1] in the first entry only."""
    config = scheduler_config(clip_sample=True, prediction_type=prediction)
    bars = DDIMScheduler.from_config(config).alphas_cumprod.double()
    x0 = torch.tensor([0.5, 3.0, -3.0, 1.5], dtype=torch.float64).view(1, 4, 1, 1)
    eps = torch.tensor([0.2, -0.4, 0.6, 1.0], dtype=torch.float64).view(1, 4, 1, 1)
    bar = bars[601]  # leading, offset 1: 801, 601, 401, 201, 1
    output = {"epsilon": eps, "sample": x0, "v_prediction": bar.sqrt() * eps - (1 - bar).sqrt() * x0}[prediction]
    return config, bar, bar.sqrt() * x0 + (1 - bar).sqrt() * eps, output.clone().requires_grad_()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_clamped_x0_has_no_gradient_in_ancestral_sampling(prediction):
    config, _, x, output = clamped_everywhere_but_one(prediction)
    table = step_table(config, SamplerConfig(num_inference_steps=5, sampler="ddpm"))
    mean, std = step_gaussian(table, torch.tensor([1]), x, output)
    log_prob = gaussian_log_prob(mean.detach() + 0.1, mean, std)
    (gradient,) = torch.autograd.grad(log_prob.sum(), output)
    assert (gradient != 0).flatten().tolist() == [True, False, False, False]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_clamped_x0_passes_no_gradient_in_ddim(prediction):
    """DDIM's direction term keeps the unclamped noise, as in diffusers: its gradient alone is left where x0 clamps."""
    config, bar, x, output = clamped_everywhere_but_one(prediction)
    then = DDIMScheduler.from_config(config).alphas_cumprod.double()[401]
    sigma = ((1 - then) / (1 - bar) * (1 - bar / then)).sqrt()
    d_eps = {"epsilon": 1.0, "sample": -(bar / (1 - bar)).sqrt(), "v_prediction": bar.sqrt()}[prediction]
    d_x0 = {"epsilon": -((1 - bar) / bar).sqrt(), "sample": 1.0, "v_prediction": -(1 - bar).sqrt()}[prediction]
    table = step_table(config, SamplerConfig(num_inference_steps=5))
    mean, _ = step_gaussian(table, torch.tensor([1]), x, output)
    (gradient,) = torch.autograd.grad(mean.sum(), output)
    by_noise = (1 - then - sigma**2).sqrt() * d_eps
    free = then.sqrt() * d_x0 + by_noise
    expected = torch.stack([free, by_noise, by_noise, by_noise]).view(1, 4, 1, 1)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=0)
    assert not math.isclose(free, by_noise)


# --- densities -------------------------------------------------------------------------------------------------


def gaussians():
    generator = torch.Generator().manual_seed(0)
    x, mean, other = torch.randn(3, 5, 3, 4, 4, generator=generator, dtype=torch.float64)
    std = torch.tensor([1e-3, 0.02, 0.3, 1.0, 4.0], dtype=torch.float64).view(-1, 1, 1, 1)
    return mean + std * x, mean, mean + std * other, std


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_log_prob_is_that_of_torch(reduction):
    x, mean, _, std = gaussians()
    every = Normal(mean, std.expand_as(mean)).log_prob(x)
    expected = getattr(every, reduction)((1, 2, 3))
    torch.testing.assert_close(gaussian_log_prob(x, mean, std, reduction), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_kl_is_that_of_torch(reduction):
    _, mean, other, std = gaussians()
    every = kl_divergence(Normal(mean, std.expand_as(mean)), Normal(other, std.expand_as(mean)))
    expected = getattr(every, reduction)((1, 2, 3))
    torch.testing.assert_close(gaussian_kl(mean, other, std, reduction), expected, rtol=1e-12, atol=0)


def test_reductions_by_default():
    """DDPO's log-probability is a mean over dimensions; a KL divergence is a sum."""
    x, mean, other, std = gaussians()
    assert torch.equal(gaussian_log_prob(x, mean, std), gaussian_log_prob(x, mean, std, "mean"))
    assert torch.equal(gaussian_kl(mean, other, std), gaussian_kl(mean, other, std, "sum"))


def test_kl_without_denominator_by_hand():
    mean = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    other = torch.tensor([[0.0, 4.0], [3.0, 4.0]])
    std = torch.tensor([[0.5], [10.0]])
    assert gaussian_kl(mean, other, std, denominator=False).tolist() == [5.0, 25.0]
    assert gaussian_kl(mean, other, std, "mean", denominator=False).tolist() == [2.5, 12.5]
    assert gaussian_kl(mean, other, std).tolist() == [10.0, 0.125]
