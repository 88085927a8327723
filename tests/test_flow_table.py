"""The step table of flow-matching models: diffusers' Euler steps, the published SDE, and the marginals it keeps."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from diffusion_gym import SamplerConfig
from diffusion_gym.models.schedulers import flow_step_table
from diffusion_gym.scheduling import flow_table, step_gaussian

SHAPE = (16, 2, 2)
SD3 = {"num_train_timesteps": 1000, "shift": 3.0}
DYNAMIC = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


def states_and_velocities(count, dtype=torch.float64):
    return torch.randn(2, count, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def table_of(steps, eta, config=SD3, tokens=256, **options):
    return flow_step_table(config, SamplerConfig(num_inference_steps=steps, eta=eta, **options), tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 10, 40])
def test_without_noise_it_is_the_euler_method_of_diffusers(steps, shift, dtype):
    config = {**SD3, "shift": shift}
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    x, velocity = states_and_velocities(steps, torch.float32)
    rows = zip(velocity, scheduler.timesteps, x, strict=True)
    expected = torch.stack([scheduler.step(v, t, row, return_dict=False)[0] for v, t, row in rows])
    table = table_of(steps, 0.0, config).to("cpu", dtype)
    mean, std = step_gaussian(table, torch.arange(steps), x.to(dtype), velocity.to(dtype))
    torch.testing.assert_close(mean.float(), expected, rtol=0, atol=1e-6)
    assert (std == 0).all()


@pytest.mark.parametrize("tokens, steps", [(256, 10), (1024, 28), (4096, 10)])
def test_the_timesteps_of_a_dynamic_shift_are_those_of_diffusers(tokens, steps):
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(DYNAMIC)
    scheduler.set_timesteps(steps, mu=calculate_shift(tokens, 256, 4096, 0.5, 1.15))
    table = table_of(steps, 0.7, dict(scheduler.config), tokens)
    assert torch.equal(table.network_timesteps.float(), scheduler.timesteps)
    assert torch.equal(table.noise.float(), scheduler.sigmas[:-1])


@pytest.mark.parametrize("level", [0.1, 0.7, 1.0])
@pytest.mark.parametrize("steps", [2, 10, 40])
def test_mean_and_std_are_those_of_the_published_sde(steps, level):
    """Flow-GRPO, equation (9), term by term; at t = 1 with the next t under the root, as its code has it."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(SD3)
    scheduler.set_timesteps(steps)
    times = [float(t) for t in scheduler.sigmas]
    x, velocity = states_and_velocities(steps)
    mean, std = step_gaussian(table_of(steps, level), torch.arange(steps), x, velocity)
    for step, (t, s) in enumerate(zip(times, times[1:], strict=False)):
        sigma = level * math.sqrt(t / (1 - (s if t == 1 else t)))
        drift = velocity[step] + sigma**2 / (2 * t) * (x[step] + (1 - t) * velocity[step])
        torch.testing.assert_close(mean[step], x[step] + drift * (s - t), rtol=1e-10, atol=1e-12)
        assert std[step].item() == pytest.approx(sigma * math.sqrt(t - s), rel=1e-12)


def end_of_a_gaussian(table, times, mean=1.5, variance=0.25):
    """Mean and variance of x_0 by the sampler with the exact velocity, where the data are one Gaussian.

    x_t is Gaussian and the velocity E[eps - x0 | x_t] is linear in x_t, so each step is x -> a x + b + std noise.
    """
    at, spread = 0.0, 1.0
    for step, t in enumerate(times[:-1].tolist()):
        slope = (t - (1 - t) * variance) / ((1 - t) ** 2 * variance + t**2)
        points = torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1)
        velocity = -mean + slope * (points - (1 - t) * mean)
        moved, std = step_gaussian(table, torch.full((2,), step), points, velocity)
        b, a = moved[0].item(), (moved[1] - moved[0]).item()
        at, spread = a * at + b, a**2 * spread + std[0].item() ** 2
    return at, spread


@pytest.mark.parametrize("level", [0.0, 0.5, 0.7, 1.0])
def test_the_sde_keeps_the_marginals_of_the_flow(level):
    """With any noise level x_0 is distributed as the data; with no drift against the noise, or one of the wrong sign,
    it is spread wider.
    """
    times = torch.linspace(1, 0, 1001, dtype=torch.float64)
    table = flow_table(times, num_train_timesteps=10**6, noise_level=level)
    at, spread = end_of_a_gaussian(table, times)
    assert at == pytest.approx(1.5, rel=1e-6)
    assert spread == pytest.approx(0.25, rel=1e-2)
    if level:
        for factor in (0, -1):
            wrong = replace(table, coef_eps=times[1:] + factor * (table.coef_eps - times[1:]))
            assert end_of_a_gaussian(wrong, times)[1] > 0.3


@pytest.mark.parametrize("steps", [1, 4, 10, 40, 100])
def test_a_table_tells_its_steps_apart(steps):
    table = table_of(steps, 0.7)
    times = table.timesteps.tolist()
    assert len(table) == steps and times[0] == 1000 and times == sorted(set(times), reverse=True)
    assert table.timesteps.dtype == torch.int64 and table.network_timesteps.dtype == torch.float64
    assert (table.network_timesteps - table.timesteps).abs().max() <= 0.5
    visited = {t: step for step, t in enumerate(times)}
    assert table.step_of.tolist() == [visited.get(t, -1) for t in range(1001)]
    assert (table.signal + table.noise == 1).all() and (table.sigma > 0).all()
    columns = (table.signal, table.noise, table.coef_x0, table.coef_eps, table.coef_xt, table.sigma)
    assert all(column.dtype == torch.float64 and column.isfinite().all() for column in columns)
    moved = table.to("cpu")
    assert moved.network_timesteps.dtype == torch.float32 and moved.timesteps.dtype == torch.int64


def test_sigma_min_floors_sigma_and_leaves_the_mean():
    plain, floored = table_of(10, 0.7), table_of(10, 0.7, sigma_min=0.3)
    assert floored.sigma.tolist() == [max(sigma, 0.3) for sigma in plain.sigma.tolist()]
    assert torch.equal(plain.coef_x0, floored.coef_x0) and torch.equal(plain.coef_eps, floored.coef_eps)


@pytest.mark.parametrize(
    "steps, config, sampler, message",
    [
        (500, SD3, "ddim", "num_inference_steps=500 puts two steps at one whole-numbered timestep of the model's 1000"),
        (1001, SD3, "ddim", "num_inference_steps=1001 is larger than the model's schedule; use at most 1000"),
        (10, SD3, "ddpm", "sampler='ddpm' is no sampler of a flow-matching model; use one of flow_sde"),
    ],
)
def test_what_cannot_be_sampled_is_refused(steps, config, sampler, message):
    with pytest.raises(ValueError, match=message):
        table_of(steps, 0.7, config, sampler=sampler)
