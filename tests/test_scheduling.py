"""The maths of a step against diffusers' own schedulers, torch.distributions and hand calculations."""

import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch.distributions import Normal, kl_divergence

from diffusion_gym import SamplerConfig
from diffusion_gym.models.latent import step_table
from diffusion_gym.scheduling import gaussian_kl, gaussian_log_prob, guide, predict_x0, step_gaussian

PREDICTIONS = ["epsilon", "v_prediction", "sample"]
SPACINGS = ["leading", "trailing", "linspace"]
RTOL = 1e-6  # invariant 1
SHAPE = (1, 4, 2, 2)


def scheduler_config(**changes):
    """The scheduler of Stable Diffusion 1.x, with changes."""
    return {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        **changes,
    }


def reference(kind, config, steps):
    """A diffusers scheduler that computes in float64: its alphas are float32 numbers, its arithmetic need not be."""
    scheduler = kind.from_config(config)
    scheduler.set_timesteps(steps)
    for name in ("alphas_cumprod", "final_alpha_cumprod", "one"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())
    return scheduler


def samples(count, seed=0, dtype=torch.float64):
    """States and network outputs of `count` steps, wide enough that `clip_sample` clamps some of them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, *SHAPE[1:], generator=generator, dtype=torch.float64).mul(1.5).to(dtype)


def ddim_steps(scheduler, x, output, eta):
    """Mean and std of every step by `DDIMScheduler.step`: with noise of zeros, and of ones on a state of zeros."""
    none, one = torch.zeros(SHAPE, dtype=x.dtype), torch.ones(SHAPE, dtype=x.dtype)
    means, stds = [], []
    for index, t in enumerate(scheduler.timesteps):
        part = slice(index, index + 1)
        means.append(scheduler.step(output[part], t, x[part], eta=eta, variance_noise=none).prev_sample)
        stds.append(scheduler.step(none, t, none, eta=eta, variance_noise=one).prev_sample.flatten()[:1])
    return torch.cat(means), torch.cat(stds).view(-1, 1, 1, 1)


def ddpm_steps(scheduler, x, output):
    """The same by `DDPMScheduler.step`, which draws its own noise: the same seed on a state of zeros shows it."""
    none = torch.zeros(SHAPE, dtype=x.dtype)
    drawn = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    means, stds = [], []
    for index, t in enumerate(scheduler.timesteps):
        part = slice(index, index + 1)
        noisy = scheduler.step(output[part], t, x[part], generator=torch.Generator().manual_seed(3)).prev_sample
        noise = scheduler.step(none, t, none, generator=torch.Generator().manual_seed(3)).prev_sample
        means.append(noisy - noise)
        stds.append((noise / drawn).flatten()[:1])
    return torch.cat(means), torch.cat(stds).view(-1, 1, 1, 1)


def ours(config, sampler, x, output):
    table = step_table(config, sampler)
    return table, step_gaussian(table, torch.arange(len(table)), x, output)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps, eta", list(itertools.product([1, 5, 20, 50], [0.3, 1.0])))
def test_ddim_agrees_with_diffusers(prediction, clip, to_one, spacing, steps, eta):
    config = scheduler_config(
        prediction_type=prediction, clip_sample=clip, set_alpha_to_one=to_one, timestep_spacing=spacing
    )
    scheduler = reference(DDIMScheduler, config, steps)
    x, output = samples(steps)
    mean, std = ddim_steps(scheduler, x, output, eta)
    table, (our_mean, our_std) = ours(config, SamplerConfig(num_inference_steps=steps, eta=eta), x, output)
    assert table.timesteps.tolist() == scheduler.timesteps.tolist()
    assert our_mean.dtype == our_std.dtype == torch.float64
    torch.testing.assert_close(our_mean, mean, rtol=RTOL, atol=1e-12)
    torch.testing.assert_close(our_std, std, rtol=RTOL, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps, offset", list(itertools.product([1, 5, 20, 50], [0, 1])))
def test_ddpm_agrees_with_diffusers(prediction, clip, variance, spacing, steps, offset):
    config = scheduler_config(
        prediction_type=prediction,
        clip_sample=clip,
        variance_type=variance,
        timestep_spacing=spacing,
        steps_offset=offset,
    )
    scheduler = reference(DDPMScheduler, config, steps)
    x, output = samples(steps)
    mean, std = ddpm_steps(scheduler, x, output)
    sampler = SamplerConfig(num_inference_steps=steps, sampler="ddpm")
    table, (our_mean, our_std) = ours(config, sampler, x, output)
    assert table.timesteps.tolist() == scheduler.timesteps.tolist()
    torch.testing.assert_close(our_mean, mean, rtol=RTOL, atol=1e-12)
    # diffusers' 1e-10 stands for 0: its clamp against the logarithm of 0
    torch.testing.assert_close(our_std, std, rtol=RTOL, atol=1.01e-10)


@pytest.mark.parametrize("kind, sampler", [(DDIMScheduler, "ddim"), (DDPMScheduler, "ddpm")])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_other_noise_schedules_and_clip_ranges(kind, sampler, schedule):
    config = scheduler_config(
        beta_schedule=schedule, num_train_timesteps=400, clip_sample=True, clip_sample_range=0.7, steps_offset=0
    )
    x, output = samples(30)
    scheduler = reference(kind, config, 30)
    mean, std = ddim_steps(scheduler, x, output, 1.0) if sampler == "ddim" else ddpm_steps(scheduler, x, output)
    _, (our_mean, our_std) = ours(config, SamplerConfig(num_inference_steps=30, sampler=sampler), x, output)
    torch.testing.assert_close(our_mean, mean, rtol=RTOL, atol=1e-12)
    torch.testing.assert_close(our_std, std, rtol=RTOL, atol=1.01e-10)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_zero_terminal_snr(prediction):
    config = scheduler_config(
        prediction_type=prediction, rescale_betas_zero_snr=True, timestep_spacing="trailing", set_alpha_to_one=True
    )
    x, output = samples(10)
    mean, std = ddim_steps(reference(DDIMScheduler, config, 10), x, output, 1.0)
    table, (our_mean, our_std) = ours(config, SamplerConfig(num_inference_steps=10), x, output)
    assert table.alpha_bar[0] == 0
    torch.testing.assert_close(our_mean, mean, rtol=RTOL, atol=1e-12)
    torch.testing.assert_close(our_std, std, rtol=RTOL, atol=0)


@pytest.mark.parametrize("steps", [5, 50])
def test_the_float32_table_of_the_policy_keeps_the_precision(steps):
    config = scheduler_config()
    x, output = samples(steps)
    mean, std = ddim_steps(reference(DDIMScheduler, config, steps), x, output, 1.0)
    table = step_table(config, SamplerConfig(num_inference_steps=steps)).to("cpu")
    our_mean, our_std = step_gaussian(table, torch.arange(steps), x.float(), output.float())
    assert our_mean.dtype == our_std.dtype == torch.float32
    scale = mean.abs().amax((1, 2, 3), keepdim=True)
    assert ((our_mean - mean).abs() / scale).max() <= RTOL
    torch.testing.assert_close(our_std.double(), std, rtol=RTOL, atol=0)


@pytest.mark.parametrize("kind, sampler", [(DDIMScheduler, "ddim"), (DDPMScheduler, "ddpm")])
@pytest.mark.parametrize("steps", [5, 50])
def test_diffusers_as_it_comes_agrees_to_its_own_precision(kind, sampler, steps):
    config = scheduler_config()
    scheduler = kind.from_config(config)
    scheduler.set_timesteps(steps)
    x, output = samples(steps, dtype=torch.float32)
    mean, std = ddim_steps(scheduler, x, output, 1.0) if sampler == "ddim" else ddpm_steps(scheduler, x, output)
    _, (our_mean, our_std) = ours(config, SamplerConfig(num_inference_steps=steps, sampler=sampler), x, output)
    torch.testing.assert_close(our_mean.float(), mean, rtol=1e-4, atol=1e-4)
    # 1 - alpha_t / alpha_(t-1) cancels in diffusers' float32; at t = 1 a few digits are left
    torch.testing.assert_close(our_std.float(), std, rtol=1e-3, atol=1.01e-10)


def test_the_last_step_reaches_the_final_alpha_bar():
    """The index is clamped after the choice: clamping first gives alpha_bar[0] with `set_alpha_to_one` too."""
    first = DDIMScheduler.from_config(scheduler_config()).alphas_cumprod[0].double()
    x, _ = samples(2)
    output = torch.zeros_like(x)  # without noise the mean is sqrt(alpha_bar of the next t) x0
    for to_one, last in ((True, torch.ones(()).double()), (False, first)):
        config = scheduler_config(set_alpha_to_one=to_one, prediction_type="sample")
        table = step_table(config, SamplerConfig(num_inference_steps=2, eta=0.0))
        assert table.coef_x0[-1] == last.sqrt()
        assert table.coef_eps[-1] == (1 - last).clamp(min=0).sqrt()
        _, std = step_gaussian(table, torch.tensor([0, 1]), x, output)
        assert std.tolist() == [[[[0.0]]]] * 2


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 61, 103, 333, 500, 999, 1000])
def test_a_table_has_exactly_the_steps_asked_for(sampler, spacing, steps):
    config = scheduler_config(timestep_spacing=spacing, steps_offset=0)
    table = step_table(config, SamplerConfig(num_inference_steps=steps, sampler=sampler))
    times = table.timesteps.tolist()
    assert len(table) == len(times) == steps
    assert times == sorted(set(times), reverse=True)
    assert min(times) >= 0 and max(times) < 1000
    for name in ("alpha_bar", "coef_x0", "coef_eps", "coef_xt", "sigma"):
        value = getattr(table, name)
        assert value.dtype == torch.float64 and value.shape == (steps,) and value.isfinite().all()
    visited = {t: step for step, t in enumerate(times)}
    assert table.step_of.tolist() == [visited.get(t, -1) for t in range(1001)]


@pytest.mark.parametrize(
    "spacing, offset, most", [("leading", 0, 1000), ("leading", 1, 999), ("trailing", 1, 1000), ("linspace", 1, 1000)]
)
def test_too_many_steps_are_refused(spacing, offset, most):
    config = scheduler_config(timestep_spacing=spacing, steps_offset=offset)
    assert step_table(config, SamplerConfig(num_inference_steps=most)).timesteps.max() == 999
    with pytest.raises(ValueError, match=f"={most + 1} is larger than the model's schedule; use at most {most}$"):
        step_table(config, SamplerConfig(num_inference_steps=most + 1))


def test_thresholding_is_refused():
    with pytest.raises(ValueError, match="thresholding=True"):
        step_table(scheduler_config(thresholding=True), SamplerConfig(num_inference_steps=5))


def test_steps_of_a_batch_may_be_mixed():
    config = scheduler_config(clip_sample=True)
    table = step_table(config, SamplerConfig(num_inference_steps=5))
    order = torch.tensor([3, 0, 4, 4, 1])
    x, output = samples(5)
    mean, std = step_gaussian(table, order, x, output)
    for row, step in enumerate(order.tolist()):
        part = slice(row, row + 1)
        alone = step_gaussian(table, torch.tensor([step]), x[part], output[part])
        assert torch.equal(mean[part], alone[0])
        assert torch.equal(std[part], alone[1])


# --- degenerate steps ------------------------------------------------------------------------------------------


def last_step_deterministic(sampler="ddim", **options):
    """A table of 5 steps whose last has sigma = 0."""
    config = scheduler_config(set_alpha_to_one=True, steps_offset=0)
    return step_table(config, SamplerConfig(num_inference_steps=5, sampler=sampler, **options))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_deterministic_step_has_log_prob_0_and_no_gradient(sampler):
    table = last_step_deterministic(sampler)
    assert (table.sigma > 0).tolist() == [True] * 4 + [False]
    x, output = samples(5)
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
@pytest.mark.parametrize("spacing", SPACINGS)
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
    x, output = samples(5)
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
    x0, eps = samples(3)
    signal, noise = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    outputs = {"epsilon": eps, "sample": x0, "v_prediction": signal * eps - noise * x0}
    for prediction, output in outputs.items():
        bars = torch.full((3, 1, 1, 1), alpha_bar, dtype=torch.float64)
        found = predict_x0(output, signal * x0 + noise * eps, bars, prediction)
        torch.testing.assert_close(found[0], x0, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found[1], eps, rtol=1e-10, atol=1e-10)


def test_an_unknown_prediction_is_named():
    with pytest.raises(ValueError, match="prediction='score' must be one of epsilon, sample, v_prediction"):
        predict_x0(torch.zeros(1), torch.zeros(1), torch.ones(1), "score")


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
    scheduler = reference(DDIMScheduler, config, 5)
    then = scheduler.alphas_cumprod[401]
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
