"""The kinds of noise that a step can have: what they leave of the marginals, without noise, and in a window."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from diffusion_gym import SamplerConfig
from diffusion_gym.flow_samplers import FLOW_SAMPLERS
from diffusion_gym.models.schedulers import flow_step_table, step_table
from diffusion_gym.scheduling import flow_table, step_gaussian

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
PRESERVING = {**BETAS, "clip_sample": False, "set_alpha_to_one": False}
SD3 = {"num_train_timesteps": 1000, "shift": 3.0}
KINDS = ["ddim", "ddpm", *FLOW_SAMPLERS]
EXACT = ["ddim", "ddpm", "cps"]  # at any step size; the others to first order in it
COUNT = 200_000


def table_of(sampler, steps=10, eta=0.7, **options):
    config = SamplerConfig(num_inference_steps=steps, sampler=sampler, eta=eta, **options)
    return flow_step_table(SD3, config, 256) if sampler in FLOW_SAMPLERS else step_table(PRESERVING, config)


def predicted(table, step, x0, eps):
    """What a network that knows x0 and eps outputs."""
    return eps if table.prediction == "epsilon" else eps - x0


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_step(table, step, point=1.5):
    """A step from the true marginal at t, whose data are one point, by Monte Carlo: mean and variance of x_s."""
    x0, eps = torch.full((COUNT, 1, 1, 1), point, dtype=torch.float64), drawn(step, COUNT, 1, 1, 1)
    x_t = table.signal[step] * x0 + table.noise[step] * eps
    steps = torch.full((COUNT,), step)
    mean, std = step_gaussian(table, steps, x_t, predicted(table, step, x0, eps))
    moved = mean + std * drawn(step + 1000, COUNT, 1, 1, 1)
    return moved.mean().item(), moved.var().item()


def within_errors(found, mean, variance):
    """Whether the two moments of COUNT samples are these, within five standard errors."""
    assert found[0] == pytest.approx(mean, abs=5 * math.sqrt(variance / COUNT) + 1e-12)
    assert found[1] == pytest.approx(variance, abs=5 * variance * math.sqrt(2 / COUNT) + 1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("sampler", EXACT)
def test_a_step_leads_from_the_marginal_at_t_to_that_at_s(sampler, eta):
    table = table_of(sampler, eta=eta)
    for step in (0, 4, 8):
        signal, noise = table.signal[step + 1].item(), table.noise[step + 1].item()
        within_errors(one_step(table, step), 1.5 * signal, noise**2)


def excess(sampler, t, dt, eta=0.7):
    """Variance of x_s over that of the flow, for data of one point: the noises in the mean and in sigma add up."""
    times = torch.tensor([t, t - dt, 0.0], dtype=torch.float64)
    table = flow_table(times, num_train_timesteps=10**6, noise_level=eta, sampler=sampler)
    return (table.coef_eps[0] ** 2 + table.sigma[0] ** 2 - (t - dt) ** 2).item()


@pytest.mark.parametrize("sampler", ["flow_sde", "dance_sde"])
def test_a_step_of_an_sde_is_too_noisy_by_the_square_of_its_length(sampler):
    """Which is why its marginals are right in the limit of many steps alone."""
    for t in (0.3, 0.6, 0.9):
        errors = [excess(sampler, t, 0.1 / 2**halvings) for halvings in range(4)]
        assert all(error > 0 for error in errors)
        assert [first / second for first, second in zip(errors, errors[1:], strict=False)] == pytest.approx([4] * 3)
        assert excess("cps", t, 0.1) == pytest.approx(0, abs=1e-15)
    table = table_of(sampler)
    variance = table.coef_eps[4].item() ** 2 + table.sigma[4].item() ** 2
    within_errors(one_step(table, 4), 1.5 * table.signal[5].item(), variance)
    assert variance > 1.005 * table.noise[5].item() ** 2


def end_of_a_gaussian(sampler, steps, eta, mean=1.5, variance=0.25):
    """Variance of x_0 after all steps with the true velocity, where the data are one Gaussian: all maps are linear."""
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    table = flow_table(times, num_train_timesteps=10**6, noise_level=eta, sampler=sampler)
    at, spread = 0.0, 1.0
    for step, t in enumerate(times[:-1].tolist()):
        slope = (t - (1 - t) * variance) / ((1 - t) ** 2 * variance + t**2)
        points = torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1)
        moved, std = step_gaussian(table, torch.full((2,), step), points, -mean + slope * (points - (1 - t) * mean))
        slope = (moved[1] - moved[0]).item()
        at, spread = slope * at + moved[0].item(), slope**2 * spread + std[0].item() ** 2
    assert at == pytest.approx(mean, rel=0.02)
    return spread


@pytest.mark.parametrize("eta", [0.3, 0.7])
@pytest.mark.parametrize("sampler", ["flow_sde", "dance_sde"])
def test_pictures_of_many_steps_of_an_sde_are_distributed_as_the_data(sampler, eta):
    """Of Gaussian data no sampler is exact at finite steps, as Euler's method is not."""
    errors = [abs(end_of_a_gaussian(sampler, steps, eta) - 0.25) for steps in (10, 50, 800)]
    assert errors[2] < errors[1] < errors[0] and errors[2] < 0.0015


def test_more_steps_of_cps_do_not_restore_the_variety_of_the_data():
    """At a fixed level its noise a step does not shrink with the step, so that it has no such limit."""
    variances = {eta: [end_of_a_gaussian("cps", steps, eta) for steps in (10, 200, 800)] for eta in (0.0, 0.3, 0.7)}
    assert variances[0.0][2] == pytest.approx(0.25, abs=0.001)
    assert variances[0.3] == pytest.approx([0.177, 0.232, 0.235], abs=0.001)
    assert variances[0.7] == pytest.approx([0.137, 0.177, 0.180], abs=0.001)


@pytest.mark.parametrize("sampler", FLOW_SAMPLERS)
def test_without_noise_every_sampler_of_a_flow_is_eulers_method(sampler):
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(SD3)
    scheduler.set_timesteps(10)
    x, velocity = drawn(0, 2, 10, 4, 2, 2)
    rows = zip(velocity, scheduler.timesteps, x, strict=True)
    expected = torch.stack([scheduler.step(v, t, row, return_dict=False)[0] for v, t, row in rows])
    mean, std = step_gaussian(table_of(sampler, eta=0.0), torch.arange(10), x, velocity)
    torch.testing.assert_close(mean, expected, rtol=0, atol=2e-6)  # its sigmas are float32
    assert (std == 0).all()
    little, _ = step_gaussian(table_of(sampler, eta=1e-4), torch.arange(10), x, velocity)
    torch.testing.assert_close(little, mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
def test_dance_sde_is_the_published_step(eta):
    """DanceGRPO, by the score as its code has it: -(x_t - (1 - t) x0) / t^2."""
    table, (x, velocity) = table_of("dance_sde", eta=eta), drawn(0, 2, 10, 4, 2, 2)
    mean, std = step_gaussian(table, torch.arange(10), x, velocity)
    times = [*table.noise.tolist(), 0.0]
    for step, (t, s) in enumerate(zip(times, times[1:], strict=False)):
        x0 = x[step] - t * velocity[step]
        score = -(x[step] - (1 - t) * x0) / t**2
        published = x[step] + velocity[step] * (s - t) - 0.5 * eta**2 * score * (s - t)
        torch.testing.assert_close(mean[step], published if s else x0, rtol=1e-10, atol=1e-12)
        assert std[step].item() == pytest.approx(eta * math.sqrt(t - s) if s else 0.0, rel=1e-12)


@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
def test_cps_is_the_published_step(eta):
    table, (x, velocity) = table_of("cps", eta=eta), drawn(0, 2, 10, 4, 2, 2)
    mean, std = step_gaussian(table, torch.arange(10), x, velocity)
    times = [*table.noise.tolist(), 0.0]
    for step, (t, s) in enumerate(zip(times, times[1:], strict=False)):
        sigma = s * math.sin(eta * math.pi / 2)
        x0, x1 = x[step] - t * velocity[step], x[step] + (1 - t) * velocity[step]
        published = (1 - s) * x0 + math.sqrt(s**2 - sigma**2) * x1
        torch.testing.assert_close(mean[step], published, rtol=1e-10, atol=1e-12)
        assert std[step].item() == pytest.approx(sigma, rel=1e-12)


# --- a window of noisy steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [(0, 10), (0, 3), (2, 4), (6, 1)])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("sampler", KINDS)
def test_outside_the_window_steps_are_those_without_noise(sampler, spacing, window):
    if sampler in FLOW_SAMPLERS:
        noisy, still = table_of(sampler), table_of(sampler, eta=0.0)
        mixed = table_of(sampler, noisy_steps=window)
    else:
        config = SamplerConfig(num_inference_steps=10, sampler=sampler, eta=0.7)
        spaced = {**PRESERVING, "timestep_spacing": spacing, "set_alpha_to_one": sampler == "ddpm"}
        noisy = step_table(spaced, config)
        still = step_table(spaced, replace(config, sampler="ddim", eta=0.0))
        mixed = step_table(spaced, replace(config, noisy_steps=window))
    inside = torch.arange(window[0], sum(window))
    outside = torch.tensor([step for step in range(10) if step not in inside], dtype=torch.int64)
    for name in ("coef_x0", "coef_eps", "coef_xt", "sigma"):
        found = getattr(mixed, name)
        assert torch.equal(found[inside], getattr(noisy, name)[inside])
        torch.testing.assert_close(found[outside], getattr(still, name)[outside], rtol=1e-12, atol=1e-12)
    assert (mixed.sigma[outside] == 0).all()
    for name in ("timesteps", "network_timesteps", "signal", "noise", "step_of"):
        assert torch.equal(getattr(mixed, name), getattr(noisy, name))


def test_sigma_min_floors_the_noise_of_the_window_alone():
    table = table_of("cps", sigma_min=0.5, noisy_steps=(6, 2))
    assert (table.sigma > 0).nonzero().flatten().tolist() == [6, 7] and (table.sigma[6:8] >= 0.5).all()


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"noisy_steps": (8, 4)},
            "noisy_steps=(8, 4) must end within the num_inference_steps=10 steps, which are 0 to 9",
        ),
        ({"noisy_steps": (-1, 2)}, "noisy_steps=(-1, 2) must be the first noisy step, at least 0"),
        ({"noisy_steps": (0, 0)}, "noisy_steps=(0, 0) must be the first noisy step, at least 0, and how many"),
        ({"noisy_steps": 3}, "noisy_steps=3 must be the first noisy step"),
        ({"noisy_steps": (0, 1.5)}, "noisy_steps=(0, 1.5) must be the first noisy step"),
        ({"noisy_steps": (True, 1)}, "noisy_steps=(True, 1) must be the first noisy step"),
        ({"sampler": "cps", "eta": 1.2}, "eta=1.2 must lie in [0, 1]"),
        ({"sampler": "flow_sde", "eta": 50}, "eta=50 must lie in [0, 10]"),
        ({"sampler": "flow_sde", "eta": math.inf}, "eta=inf must lie in [0, 10]"),
    ],
)
def test_a_window_or_a_noise_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError) as error:
        SamplerConfig(num_inference_steps=10, **options)
    assert message in str(error.value)


def test_the_noise_of_an_sde_may_be_larger_than_that_of_ancestral_sampling():
    assert table_of("flow_sde", eta=1.4).sigma[3] == pytest.approx(2 * table_of("flow_sde", eta=0.7).sigma[3])


@pytest.mark.parametrize("sampler", FLOW_SAMPLERS)
def test_a_sampler_of_flows_is_refused_by_a_variance_preserving_model(sampler, make_env):
    with pytest.raises(ValueError, match=f"sampler='{sampler}' is a sampler of flow-matching models"):
        make_env(sampler=sampler)


def test_a_model_that_does_not_read_the_window_is_refused(make_env, monkeypatch):
    model = make_env().unwrapped.model
    whole = model.step_table
    monkeypatch.setattr(model, "step_table", lambda config: whole(replace(config, noisy_steps=None)))
    with pytest.raises(ValueError, match=r"noisy_steps=\(0, 2\) is not read by step_table of model="):
        make_env(noisy_steps=(0, 2))
