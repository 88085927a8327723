"""Noising a clean sample against diffusers' own schedulers, and against its inverse."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from diffusion_gym import SamplerConfig
from diffusion_gym.models.schedulers import flow_step_table, step_table
from diffusion_gym.scheduling import add_noise, predict_x0

CONFIG = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
STEPS = 10


@pytest.fixture
def drawn():
    """x_0 and eps of each step, float64."""
    return torch.randn(2, STEPS, 4, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("kind", "sampler"), [(DDIMScheduler, "ddim"), (DDPMScheduler, "ddpm")])
@pytest.mark.parametrize("schedule", ["scaled_linear", "squaredcos_cap_v2"])
def test_it_is_that_of_diffusers(drawn, kind, sampler, schedule, dtype):
    config = {**CONFIG, "beta_schedule": schedule}
    x0, noise = drawn.to(dtype)
    table = step_table(config, SamplerConfig(num_inference_steps=STEPS, sampler=sampler)).to("cpu", dtype)
    ours = add_noise(x0, noise, table.signal.view(-1, 1, 1, 1), table.noise.view(-1, 1, 1, 1))
    wanted = kind.from_config(config).add_noise(x0, noise, table.timesteps)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_that_of_a_flow_model_is_that_of_diffusers(drawn, dtype):
    x0, noise = drawn.to(dtype)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    table = flow_step_table(scheduler.config, SamplerConfig(num_inference_steps=STEPS), 4).to("cpu", dtype)
    ours = add_noise(x0, noise, table.signal.view(-1, 1, 1, 1), table.noise.view(-1, 1, 1, 1))
    scheduler.set_timesteps(STEPS)
    wanted = scheduler.scale_noise(x0, scheduler.timesteps, noise)
    torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction", "flow"])
def test_a_perfect_prediction_gives_the_picture_and_the_noise_back(drawn, prediction):
    x0, eps = drawn
    noise = torch.linspace(0.05, 0.95, STEPS, dtype=torch.float64).view(-1, 1, 1, 1)
    signal = 1 - noise if prediction == "flow" else (1 - noise**2).sqrt()
    outputs = {"epsilon": eps, "sample": x0, "v_prediction": signal * eps - noise * x0, "flow": eps - x0}
    found = predict_x0(outputs[prediction], add_noise(x0, eps, signal, noise), signal, noise, prediction)
    torch.testing.assert_close(found, (x0, eps), rtol=1e-12, atol=1e-12)
