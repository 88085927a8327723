"""The step tables of variance-preserving models against diffusers' own schedulers."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from diffusion_gym import SamplerConfig
from diffusion_gym.models.schedulers import ddim_scheduler, step_table
from diffusion_gym.scheduling import step_gaussian

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
@pytest.mark.parametrize("steps, eta", [(1, 0.3), (5, 1.0), (20, 0.3), (50, 1.0)])
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
@pytest.mark.parametrize("steps, offset", [(1, 1), (5, 0), (20, 1), (50, 0)])
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
    assert (table.signal[0], table.noise[0]) == (0, 1)
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
    for name in ("signal", "noise", "coef_x0", "coef_eps", "coef_xt", "sigma"):
        value = getattr(table, name)
        assert value.dtype == torch.float64 and value.shape == (steps,) and value.isfinite().all()
    torch.testing.assert_close(table.signal**2 + table.noise**2, torch.ones(steps, dtype=torch.float64))
    assert table.network_timesteps is table.timesteps
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


@pytest.mark.parametrize("kind", [None, "FlowMatchEulerDiscreteScheduler"])
def test_a_scheduler_without_betas_is_refused(kind):
    with pytest.raises(ValueError, match=f"model='mine': its scheduler, {kind}, has no betas"):
        ddim_scheduler("mine", {"num_train_timesteps": 1000, "_class_name": kind})


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_step_whose_mean_is_infinite_is_refused(prediction, sampler):
    """Noise predicted where x_t has no signal, and anything where it has no noise."""
    silent = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    clean = {"trained_betas": [0.0, *[0.01] * 99], "num_train_timesteps": 100, "timestep_spacing": "linspace"}
    options = SamplerConfig(num_inference_steps=4, sampler=sampler)
    if prediction == "epsilon":
        with pytest.raises(ValueError, match="'epsilon' at timestep 999 of .*, where x_t has no signal"):
            step_table(scheduler_config(prediction_type=prediction, **silent), options)
    else:
        assert step_table(scheduler_config(prediction_type=prediction, **silent), options).signal[0] == 0
    with pytest.raises(ValueError, match=f"{prediction!r} at timestep 0 of .*, where x_t has no noise"):
        step_table(scheduler_config(prediction_type=prediction, **clean), options)


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
