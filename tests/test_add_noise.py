"""Noising a clean sample against diffusers' own schedulers, and against its inverse."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from diffusion_gym import SamplerConfig
from diffusion_gym.models.latent import step_table
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
    ours = add_noise(x0, noise, table.alpha_bar.view(-1, 1, 1, 1))
    wanted = kind.from_config(config).add_noise(x0, noise, table.timesteps)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("alpha_bar, weights", [(1.0, (1, 0)), (0.0, (0, 1)), (0.64, (0.8, 0.6))])
def test_the_weights_of_picture_and_noise(drawn, alpha_bar, weights):
    x0, noise = drawn
    expected = weights[0] * x0 + weights[1] * noise
    torch.testing.assert_close(add_noise(x0, noise, torch.tensor(alpha_bar, dtype=torch.float64)), expected)


def test_a_perfect_prediction_gives_the_picture_and_the_noise_back(drawn):
    x0, noise = drawn
    alpha_bar = torch.linspace(0.05, 0.95, STEPS, dtype=torch.float64).view(-1, 1, 1, 1)
    x_t = add_noise(x0, noise, alpha_bar)
    velocity = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0  # arXiv:2202.00512, section 4
    for output, prediction in ((noise, "epsilon"), (x0, "sample"), (velocity, "v_prediction")):
        found = predict_x0(output, x_t, alpha_bar, prediction)
        torch.testing.assert_close(found, (x0, noise), rtol=1e-12, atol=1e-12)
