"""How a trajectory is sampled: one frozen object that the environment makes and the policy shares."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, Literal, get_args

from diffusion_gym.registry import WrongKeyword, unknown_name

Sampler = Literal["ddim", "ddpm", "flow_sde", "dance_sde", "cps"]
Reduction = Literal["mean", "sum"]
SolverName = Literal["dpm++", "unipc", "euler", "heun"]  # short for schedulers of diffusers; models/solvers.py

_LEAST_NOISE: Final = 1e-6  # float32 numbers near 1 are 1e-7 apart
_MOST_NOISE: Final = 10.0  # a noise level of a flow's SDE; from some tens on float32 overflows


@dataclass(frozen=True)
class SamplerConfig:
    """The sampler of the denoising process; every default is the one of the DDPO paper, table F.6.

    Raises:
        ValueError: a value out of its range.
    """

    num_inference_steps: int = 50
    """T, the number of denoising steps, which is the length of an episode."""
    guidance_scale: float = 5.0
    """w of classifier-free guidance, eps = w eps(x,t,c) + (1-w) eps(x,t,null); 1 switches it off. Diffusers'
    pipelines switch it off below 1 too; here the formula holds there."""
    eta: float = 1.0
    """Noise of the sampler: 0 is deterministic; 1 is ancestral sampling in DDIM, and all noise new in `cps`. It is the
    noise level a of `flow_sde` and `dance_sde`, which may be larger than 1; `ddpm` does not read it."""
    sigma_min: float = 0.0
    """Floor of the standard deviation of a step, in sampling and in scoring alike."""
    log_prob_reduction: Reduction = "mean"
    """How a step's log-probability sums up its dimensions: DDPO's `mean` (goes with clip range 1e-4) or `sum`."""
    sampler: Sampler = "ddim"
    """Of a variance-preserving model `ddim` with `eta`, or `ddpm`, ancestral sampling with the variance that its
    scheduler names. Of a flow-matching model `flow_sde` (Flow-GRPO), `dance_sde` (DanceGRPO) or `cps`
    (coefficients-preserving), all with `eta`; `ddim`, the default, is `flow_sde` there."""
    noisy_steps: tuple[int, int] | None = None
    """The window of noisy steps: its first step, 0 being the noise, and its length. The others are deterministic: they
    have no log-probability and are not trained on. None has noise in all steps."""

    def __post_init__(self) -> None:
        for name in ("guidance_scale", "eta", "sigma_min"):
            value = getattr(self, name)
            _require(isinstance(value, int | float), f"{name}={value!r} must be a number")
        _require(
            isinstance(self.num_inference_steps, int) and self.num_inference_steps >= 1,
            f"num_inference_steps={self.num_inference_steps!r} must be a whole number of at least 1",
        )
        _require(
            math.isfinite(self.guidance_scale) and self.guidance_scale >= 0,
            f"guidance_scale={self.guidance_scale!r} must be a number of at least 0; 1 means no guidance",
        )
        if self.sampler in ("flow_sde", "dance_sde"):
            _require(
                0 <= self.eta <= _MOST_NOISE,
                f"eta={self.eta!r} must lie in [0, {_MOST_NOISE:g}]; flow models are trained at about 0.7",
            )
        else:
            _require(
                0 <= self.eta <= 1,
                f"eta={self.eta!r} must lie in [0, 1]; 1 is ancestral sampling, 0 deterministic; of a flow-matching "
                "model sampler='flow_sde' takes more",
            )
        _require(
            math.isfinite(self.sigma_min) and self.sigma_min >= 0, f"sigma_min={self.sigma_min!r} must be at least 0"
        )
        for name in ("eta", "sigma_min"):
            value = getattr(self, name)
            _require(
                value == 0 or value >= _LEAST_NOISE,
                f"{name}={value!r} is noise that float32 rounds away, so that no gradient is left; give 0, or at least "
                f"{_LEAST_NOISE:g}",
            )
        for name, choices in (("log_prob_reduction", Reduction), ("sampler", Sampler)):
            value = getattr(self, name)
            _require(value in get_args(choices), f"{name}={value!r} must be one of {', '.join(get_args(choices))}")
        if self.noisy_steps is not None:
            self._check_window()

    def _check_window(self) -> None:
        window: Any = self.noisy_steps
        steps = self.num_inference_steps
        remedy = "must be the first noisy step, at least 0, and how many there are, at least 1"
        _require(
            isinstance(window, tuple | list) and len(window) == 2 and all(type(number) is int for number in window),
            f"noisy_steps={window!r} {remedy}",
        )
        start, length = window
        object.__setattr__(self, "noisy_steps", (start, length))  # a list of JSON would equal no tuple
        _require(start >= 0 and length >= 1, f"noisy_steps={self.noisy_steps!r} {remedy}")
        _require(
            start + length <= steps,
            f"noisy_steps={self.noisy_steps!r} must end within the num_inference_steps={steps} steps, which are 0 to "
            f"{steps - 1}; give a smaller start or length",
        )

    @classmethod
    def from_options(cls, options: Mapping[str, Any], defaults: Mapping[str, Any]) -> SamplerConfig:
        """Build from keyword arguments, a model's own `defaults` standing in for those not given.

        Raises:
            TypeError: an option that is no field of this class, with the closest field suggested.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise WrongKeyword(unknown_name("keyword argument", name, known))
        return cls(**{**defaults, **options})


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
