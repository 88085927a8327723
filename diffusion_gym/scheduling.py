"""The maths of one denoising step, as pure tensor functions.

A step turns a noisy `x_t` and the network's prediction into the Gaussian of `x_{t-1}`, the policy
`pi(a|s) = N(mu, sigma_t^2 I)` of the DDPO paper (section C.3). Every sampler here has a mean of one form,

    mu = coef_x0 * x0 + coef_eps * eps + coef_xt * x_t,

with coefficients that are computed once, in float64, and looked up by step. A noisy sample is always
x_t = signal * x0 + noise * eps: with signal^2 + noise^2 = 1 in variance-preserving models (DDPM, Stable Diffusion 1.x,
SDXL), with signal + noise = 1 in flow-matching ones (Stable Diffusion 3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Literal, get_args

import torch

from diffusion_gym.config import Reduction
from diffusion_gym.flow_samplers import FLOW_SAMPLERS

Prediction = Literal["epsilon", "sample", "v_prediction", "flow"]
Variance = Literal["fixed_small", "fixed_large"]
TERMINAL: Final = -1
"""The timestep of x_0, from which no step leads on: none that a sampler visits, 0 included."""


@dataclass(frozen=True)
class NoiseSchedule:
    """What a scheduler says of the noise of a variance-preserving model.

    Attributes:
        alpha_bar: the cumulative product of 1 - beta, float64 `(train steps,)`.
        final_alpha_bar: alpha-bar after the last step: 1, or `alpha_bar[0]` with `set_alpha_to_one=False`.
        prediction: what the network predicts.
        clip_x0: bound of the predicted x0 (`clip_sample`), None where it is not clamped.
        variance: variance of the ancestral sampler.
    """

    alpha_bar: torch.Tensor
    final_alpha_bar: float
    prediction: Prediction = "epsilon"
    clip_x0: float | None = None
    variance: Variance = "fixed_small"


@dataclass(frozen=True)
class StepTable:
    """Coefficients of all T steps, in sampling order; each tensor is `(T,)`.

    Attributes:
        timesteps: int64, the scheduler's t in whole numbers: the `timestep` of an observation.
        network_timesteps: what the network is given; `timesteps` itself, or the exact t where it is not whole.
        signal: weight of x0 in x_t.
        noise: weight of eps in x_t.
        coef_x0: weight of the predicted x0 in the mean.
        coef_eps: weight of the predicted noise in the mean.
        coef_xt: weight of x_t in the mean.
        sigma: standard deviation; 0 marks a deterministic step.
        step_of: int64 `(train steps + 1,)`, the step at which a timestep is visited, -1 where it is not.
        prediction: what the network predicts.
        clip_x0: bound of the predicted x0, or None.
    """

    timesteps: torch.Tensor
    network_timesteps: torch.Tensor
    signal: torch.Tensor
    noise: torch.Tensor
    coef_x0: torch.Tensor
    coef_eps: torch.Tensor
    coef_xt: torch.Tensor
    sigma: torch.Tensor
    step_of: torch.Tensor
    prediction: Prediction
    clip_x0: float | None

    def __len__(self) -> int:
        return len(self.timesteps)

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> StepTable:
        """The table on a device, its coefficients in `dtype`."""
        moved: dict[str, Any] = {
            field.name: value.to(device, dtype if value.is_floating_point() else value.dtype)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return replace(self, **moved)


def ddim_table(
    schedule: NoiseSchedule,
    timesteps: torch.Tensor,
    previous: torch.Tensor,
    *,
    eta: float,
    sigma_min: float = 0.0,
) -> StepTable:
    """Table of the DDIM sampler, formulas (12) and (16) of arXiv:2010.02502.

    Args:
        schedule: the noise schedule.
        timesteps: int64 `(T,)`, descending.
        previous: int64 `(T,)`, the timestep that each step leads to; negative at the end.
        eta: 0 deterministic to 1 ancestral.
        sigma_min: floor of sigma; the mean keeps the coefficients of the unfloored one.

    Raises:
        ValueError: a step's mean is infinite.
    """
    now, then = _alpha_bars(schedule, timesteps, previous)
    variance = (1 - then) / (1 - now) * (1 - now / then)
    sigma = eta * variance.sqrt()
    direction = (1 - then - sigma**2).clamp(min=0).sqrt()
    zero = torch.zeros_like(sigma)
    return _table(schedule, timesteps, now, then.sqrt(), direction, zero, sigma.clamp(min=sigma_min))


def ddpm_table(
    schedule: NoiseSchedule, timesteps: torch.Tensor, previous: torch.Tensor, *, sigma_min: float = 0.0
) -> StepTable:
    """Table of ancestral sampling, formula (7) of arXiv:2006.11239; the step at t = 0 adds no noise.

    Args:
        schedule: the noise schedule; its `variance` is the posterior's (`fixed_small`) or beta (`fixed_large`).
        timesteps: int64 `(T,)`, descending.
        previous: int64 `(T,)`, the timestep that each step leads to; negative at the end.
        sigma_min: floor of sigma.

    Raises:
        ValueError: a step's mean is infinite.
    """
    now, then = _alpha_bars(schedule, timesteps, previous, final=1.0)
    beta = 1 - now / then
    coef_x0 = then.sqrt() * beta / (1 - now)
    coef_xt = (now / then).sqrt() * (1 - then) / (1 - now)
    variance = beta if schedule.variance == "fixed_large" else (1 - then) / (1 - now) * beta
    # No noise at t = 0, as in diffusers. Where the variance itself is 0 diffusers adds noise of 1e-10, which no
    # float32 latent can hold and no log-probability could score: such a step is deterministic here.
    sigma = torch.where(timesteps > 0, variance.clamp(min=0).sqrt(), 0.0)
    zero = torch.zeros_like(sigma)
    return _table(schedule, timesteps, now, coef_x0, zero, coef_xt, sigma.clamp(min=sigma_min))


def flow_table(
    times: torch.Tensor,
    *,
    num_train_timesteps: int,
    noise_level: float,
    sampler: str = "flow_sde",
    sigma_min: float = 0.0,
) -> StepTable:
    """Table of a sampler of flow matching, for x_t = (1 - t) x0 + t eps; see `flow_samplers` for what each computes.

    Args:
        times: float64 `(T + 1,)`, the t of each step in (0, 1], descending, and after them the t of the end, 0.
        num_train_timesteps: what t = 1 is called in `timesteps`.
        noise_level: a; 0 is deterministic.
        sampler: a key of `FLOW_SAMPLERS`.
        sigma_min: floor of the standard deviation; the mean keeps the coefficients of the unfloored one.

    Raises:
        ValueError: two steps share a whole-numbered timestep, by which an observation tells them apart.
    """
    now, then = times[:-1].double(), times[1:].double()
    exact = now * num_train_timesteps
    timesteps = exact.round().to(torch.int64)
    if len(timesteps.unique()) < len(timesteps):
        raise ValueError(
            f"num_inference_steps={len(timesteps)} puts two steps at one whole-numbered timestep of the model's "
            f"{num_train_timesteps}; use fewer"
        )
    coef_eps, sigma = FLOW_SAMPLERS[sampler](now, then, noise_level)
    return StepTable(
        timesteps=timesteps,
        network_timesteps=exact,
        signal=1 - now,
        noise=now,
        coef_x0=1 - then,
        coef_eps=coef_eps,
        coef_xt=torch.zeros_like(now),
        sigma=sigma.clamp(min=sigma_min),
        step_of=_step_of(timesteps, num_train_timesteps),
        prediction="flow",
        clip_x0=None,
    )


def windowed(noisy: StepTable, still: StepTable, noisy_steps: tuple[int, int]) -> StepTable:
    """The steps of one table within a window, and those of another outside it.

    Args:
        noisy: the table of a sampler with noise.
        still: that of the sampler without noise, at the same timesteps.
        noisy_steps: the first step of the window, 0 being the noise, and how many steps it has.
    """
    start, length = noisy_steps
    steps = torch.arange(len(noisy))
    inside = (steps >= start) & (steps < start + length)
    names = ("coef_x0", "coef_eps", "coef_xt", "sigma")
    mixed: dict[str, Any] = {name: torch.where(inside, getattr(noisy, name), getattr(still, name)) for name in names}
    return replace(noisy, **mixed)


def _alpha_bars(
    schedule: NoiseSchedule, timesteps: torch.Tensor, previous: torch.Tensor, final: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    bars = schedule.alpha_bar.double()
    last = torch.tensor(schedule.final_alpha_bar if final is None else final, dtype=torch.float64)
    # Choose the final alpha-bar first and clamp the index after: the other way round never reaches it.
    return bars[timesteps], torch.where(previous < 0, last, bars[previous.clamp(min=0)])


def _table(
    schedule: NoiseSchedule,
    timesteps: torch.Tensor,
    alpha_bar: torch.Tensor,
    coef_x0: torch.Tensor,
    coef_eps: torch.Tensor,
    coef_xt: torch.Tensor,
    sigma: torch.Tensor,
) -> StepTable:
    # x0 = (x_t - noise eps) / signal needs a signal; every sampler's sigma, and eps of x0, divide by the noise.
    for name, absent in (("signal", (alpha_bar <= 0) & (schedule.prediction == "epsilon")), ("noise", alpha_bar >= 1)):
        if bool(absent.any()):
            raise ValueError(
                f"prediction_type={schedule.prediction!r} at timestep {int(timesteps[absent][0])} of the model's "
                f"scheduler, where x_t has no {name}, has an infinite mean; "
                + (
                    "a schedule of zero terminal SNR needs a model with prediction_type 'v_prediction' or 'sample', "
                    "or timestep_spacing 'leading', which leaves that timestep out"
                    if name == "signal"
                    else "use a model whose betas are above 0"
                )
            )
    return StepTable(
        timesteps=timesteps,
        network_timesteps=timesteps,
        signal=alpha_bar.sqrt(),
        noise=(1 - alpha_bar).sqrt(),
        coef_x0=coef_x0,
        coef_eps=coef_eps,
        coef_xt=coef_xt,
        sigma=sigma,
        step_of=_step_of(timesteps, len(schedule.alpha_bar)),
        prediction=schedule.prediction,
        clip_x0=schedule.clip_x0,
    )


def _step_of(timesteps: torch.Tensor, num_train_timesteps: int) -> torch.Tensor:
    step_of = torch.full((num_train_timesteps + 1,), -1, dtype=torch.int64)
    step_of[timesteps] = torch.arange(len(timesteps))
    return step_of


def guide(conditional: torch.Tensor, unconditional: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance, w eps(x,t,c) + (1-w) eps(x,t,null): equation (5) of the DDPO paper."""
    return unconditional + scale * (conditional - unconditional)


def predict_x0(
    output: torch.Tensor, x_t: torch.Tensor, signal: torch.Tensor, noise: torch.Tensor, prediction: Prediction
) -> tuple[torch.Tensor, torch.Tensor]:
    """The denoised estimate x0 and the noise eps that a network's output stands for.

    Args:
        output: the network's output `(N, C, H, W)`.
        x_t: the noisy sample signal * x0 + noise * eps, `(N, C, H, W)`.
        signal: weight of x0, broadcastable, such as `(N, 1, 1, 1)`.
        noise: weight of eps, likewise.
        prediction: what `output` is: eps, x0, `v_prediction` signal * eps - noise * x0 (arXiv:2202.00512, appendix D;
            for signal^2 + noise^2 = 1), or `flow`, the velocity eps - x0 (for signal + noise = 1).

    Raises:
        ValueError: an unknown prediction.
    """
    if prediction == "epsilon":
        return (x_t - noise * output) / signal, output
    if prediction == "sample":
        return output, (x_t - signal * output) / noise
    if prediction == "v_prediction":
        return signal * x_t - noise * output, signal * output + noise * x_t
    if prediction == "flow":
        return x_t - noise * output, x_t + signal * output
    raise ValueError(f"prediction={prediction!r} must be one of {', '.join(get_args(Prediction))}")


def add_noise(x0: torch.Tensor, eps: torch.Tensor, signal: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """x_t of a clean sample, signal * x0 + noise * eps: formula (4) of arXiv:2006.11239 in either parametrisation.

    Args:
        x0: `(N, C, H, W)`.
        eps: drawn from N(0, I), the same shape.
        signal: weight of x0 at t, broadcastable.
        noise: weight of eps at t, broadcastable.
    """
    return signal * x0 + noise * eps


def step_gaussian(
    table: StepTable, steps: torch.Tensor, x_t: torch.Tensor, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean `(N, C, H, W)` and standard deviation `(N, 1, 1, 1)` of `x_{t-1}`, for any mix of steps.

    Args:
        table: the step table, on the samples' device.
        steps: int64 `(N,)`, the step of each sample, 0 being the first.
        x_t: float `(N, C, H, W)`.
        output: the (guided) network output, the same shape.
    """
    shape = (-1,) + (1,) * (x_t.ndim - 1)
    signal, noise = table.signal[steps].view(shape), table.noise[steps].view(shape)
    x0, eps = predict_x0(output, x_t, signal, noise, table.prediction)
    if table.clip_x0 is not None:
        x0 = x0.clamp(-table.clip_x0, table.clip_x0)  # its gradient is zero where it clamps
    return step_mean(table, steps, x_t, x0, eps), table.sigma[steps].view(shape)


def step_mean(
    table: StepTable, steps: torch.Tensor, x_t: torch.Tensor, x0: torch.Tensor, eps: torch.Tensor
) -> torch.Tensor:
    """Mean `(N, C, H, W)` of `x_{t-1}` for a given clean sample and noise, predicted or true ones.

    Args:
        table: the step table, on the samples' device.
        steps: int64 `(N,)`, the step of each sample, 0 being the first.
        x_t: the noisy sample, float `(N, C, H, W)`.
        x0: the clean sample, the same shape.
        eps: the noise, the same shape.
    """
    shape = (-1,) + (1,) * (x_t.ndim - 1)
    mean = table.coef_x0[steps].view(shape) * x0
    return mean + table.coef_eps[steps].view(shape) * eps + table.coef_xt[steps].view(shape) * x_t


def gaussian_log_prob(
    x: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, reduction: Reduction = "mean"
) -> torch.Tensor:
    """Log-density `(N,)` of `x` under N(mean, std^2 I); 0 where `std` is 0, a deterministic step.

    Args:
        x: `(N, ...)`.
        mean: `(N, ...)`.
        std: `(N, 1, ...)`.
        reduction: `mean` or `sum` over the dimensions.
    """
    stochastic = std > 0
    safe = torch.where(stochastic, std, 1.0)  # no division by 0, also not in the gradient
    density = -0.5 * ((x - mean) / safe) ** 2 - safe.log() - 0.5 * math.log(2 * math.pi)
    return _reduce(torch.where(stochastic, density, 0.0), reduction)


def gaussian_kl(
    mean: torch.Tensor,
    other: torch.Tensor,
    std: torch.Tensor,
    reduction: Reduction = "sum",
    *,
    denominator: bool = True,
) -> torch.Tensor:
    """KL divergence `(N,)` between two Gaussians of equal std, ||mean - other||^2 / (2 std^2); 0 where std is 0.

    Args:
        mean: `(N, ...)`, the mean of one.
        other: `(N, ...)`, the mean of the other.
        std: `(N, 1, ...)`, the standard deviation of both.
        reduction: `sum` over the dimensions is the divergence; `mean` scales it like DDPO's log-probability.
        denominator: False leaves out 2 std^2. The DPOK code weighs no step by its std either, but compares predictions
            of the noise, not means.
    """
    stochastic = std > 0
    scale = 2 * torch.where(stochastic, std, 1.0) ** 2 if denominator else 1.0
    return _reduce(torch.where(stochastic, (mean - other) ** 2 / scale, 0.0), reduction)


def _reduce(x: torch.Tensor, reduction: Reduction) -> torch.Tensor:
    flat = x.flatten(1)
    return flat.mean(1) if reduction == "mean" else flat.sum(1)
