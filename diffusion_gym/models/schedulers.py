"""The scheduler of a pipeline's folder: the DDIM or Euler scheduler that takes its place, and its step table."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from diffusion_gym.config import SamplerConfig
from diffusion_gym.flow_samplers import FLOW_SAMPLERS
from diffusion_gym.models.fields import FLOW_SCHEDULER, FLOW_SOLVER, VARIANCE_PRESERVING, check_fields, read_config
from diffusion_gym.scheduling import NoiseSchedule, StepTable, ddim_table, ddpm_table, flow_table, windowed

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

# The schedulers of x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps; DDIM is exact for the model of any of them.
PRESERVING: Final = (
    *("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "PNDMScheduler"),
    *("LMSDiscreteScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"),
    *("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverMultistepScheduler"),
    *("DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler"),
    *("SASolverScheduler", "LCMScheduler", "TCDScheduler"),
)
FLOW: Final = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
FLOW_SOLVERS: Final = (
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler"),
    *("UniPCMultistepScheduler", "SASolverScheduler"),
)


def read_scheduler(model: str, folder: str, part: str, index: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's config as its class has it: fields that the file lacks have the defaults of that class.

    Args:
        model: what the model is called.
        folder: the pipeline's folder.
        part: the scheduler's sub-folder, or `""`.
        index: what `model_index.json` says; it names the class, under whose name `_class_name` the config comes.

    Raises:
        ValueError: there is no such config, or it holds no JSON object.
    """
    import diffusers

    config = read_config(model, Path(folder, part, "scheduler_config.json"))
    named = (index.get("scheduler") or (None, None))[1] or config.get("_class_name")
    kind = getattr(diffusers, named, None) if isinstance(named, str) else None
    parameters = {} if kind is None else inspect.signature(kind.__init__).parameters
    defaults = {name: each.default for name, each in parameters.items() if each.default is not inspect.Parameter.empty}
    return {**defaults, **config, "_class_name": named}


def ddim_scheduler(model: str, config: Mapping[str, Any], *, clamps: bool = False) -> DDIMScheduler:
    """DDIM in the place of a variance-preserving model's own scheduler.

    A scheduler without `clip_sample`, as most are, clamps nothing. DDIM's own default would clamp x0.

    Args:
        model: what the model is called.
        config: of any scheduler with betas, complete, as `read_scheduler` has it.
        clamps: what a config without `clip_sample` means.

    Raises:
        ValueError: the scheduler is of another kind; or a field of it has a value that DDIM cannot honour.
    """
    from diffusers import DDIMScheduler

    if (kind := config.get("_class_name")) not in PRESERVING or "beta_schedule" not in config:
        raise ValueError(
            f"model={model!r}: its scheduler, {kind}, has no betas; use a model with a scheduler such as "
            f"{', '.join(PRESERVING)}"
        )
    check_fields(model, "scheduler_config.json", config, VARIANCE_PRESERVING, complete=True)
    own = _fields_of(DDIMScheduler, config)
    if "variance_type" in config:  # which DDPM reads, where it is the sampler
        own["variance_type"] = config["variance_type"]
    return DDIMScheduler.from_config({"clip_sample": clamps, **own})


def flow_scheduler(model: str, config: Mapping[str, Any]) -> FlowMatchEulerDiscreteScheduler:
    """Euler's method in the place of a flow-matching model's own scheduler.

    Args:
        model: what the model is called.
        config: complete, as `read_scheduler` has it.

    Raises:
        ValueError: the scheduler is of another kind; or a field of it has a value that the sampler cannot honour.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    kind = config.get("_class_name")
    if kind in FLOW:
        check_fields(model, "scheduler_config.json", config, FLOW_SCHEDULER, complete=True)
        return FlowMatchEulerDiscreteScheduler.from_config(_fields_of(FlowMatchEulerDiscreteScheduler, config))
    if kind not in FLOW_SOLVERS or not config.get("use_flow_sigmas"):
        raise ValueError(
            f"model={model!r}: its scheduler, {kind}, is none of a flow; use a model with a scheduler such as "
            f"{', '.join(FLOW)}"
        )
    check_fields(model, "scheduler_config.json", config, FLOW_SOLVER, complete=True)
    # `flow_shift` is what these call the shift; the pipeline's dynamic one ends at 1.16 where the config does not say.
    own = {**_fields_of(FlowMatchEulerDiscreteScheduler, config), "shift": config["flow_shift"], "max_shift": 1.16}
    return FlowMatchEulerDiscreteScheduler.from_config(own)


def _fields_of(kind: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config that a scheduler class of diffusers reads."""
    known = {*inspect.signature(kind.__init__).parameters, "_class_name"}
    return {name: value for name, value in config.items() if name in known}


def stated(scheduler: Any) -> dict[str, Any]:
    """The config of a diffusers scheduler, every value of which counts when another scheduler is made of it.

    Diffusers notes the fields that were not given, and `from_config` then passes over their values, even those that
    a pipeline has corrected since.
    """
    return {name: value for name, value in scheduler.config.items() if name != "_use_default_values"}


def step_table(scheduler_config: Mapping[str, Any], config: SamplerConfig) -> StepTable:
    """Step table of a scheduler config, float64.

    Args:
        scheduler_config: of a `DDIMScheduler`, complete, as `stated` has it.
        config: the sampler.

    Raises:
        ValueError: a sampler of flow matching; T is larger than the schedule; or a step's mean is infinite.
    """
    from diffusers import DDIMScheduler, DDPMScheduler

    if config.sampler in FLOW_SAMPLERS:
        raise ValueError(
            f"sampler={config.sampler!r} is a sampler of flow-matching models, and the noise of this one preserves the "
            "variance; use 'ddim' or 'ddpm'"
        )
    scheduler = (DDPMScheduler if config.sampler == "ddpm" else DDIMScheduler).from_config(scheduler_config)
    total, steps = scheduler.config.num_train_timesteps, config.num_inference_steps
    most = total - scheduler.config.steps_offset if scheduler.config.timestep_spacing == "leading" else total
    if steps > most:
        raise ValueError(f"num_inference_steps={steps} is larger than the model's schedule; use at most {most}")
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.to(torch.int64).cpu()[:steps]  # `trailing` can round to one more
    schedule = NoiseSchedule(
        alpha_bar=scheduler.alphas_cumprod.double(),
        final_alpha_bar=float(getattr(scheduler, "final_alpha_cumprod", 1.0)),
        prediction=scheduler.config.prediction_type,
        clip_x0=scheduler.config.clip_sample_range if scheduler.config.clip_sample else None,
        variance="fixed_large" if scheduler.config.get("variance_type") == "fixed_large" else "fixed_small",
    )
    previous = timesteps - total // steps
    if config.sampler == "ddpm":
        previous = torch.cat([timesteps[1:], torch.tensor([-1])])
        noisy = ddpm_table(schedule, timesteps, previous, sigma_min=config.sigma_min)
        schedule = replace(schedule, final_alpha_bar=1.0)  # where ancestral sampling ends
    else:
        noisy = ddim_table(schedule, timesteps, previous, eta=config.eta, sigma_min=config.sigma_min)
    if config.noisy_steps is None:
        return noisy
    return windowed(noisy, ddim_table(schedule, timesteps, previous, eta=0.0), config.noisy_steps)


def flow_step_table(
    scheduler_config: Mapping[str, Any],
    config: SamplerConfig,
    tokens: int,
    *,
    even: bool = False,
    shift: float | None = None,
) -> StepTable:
    """Step table of a flow-matching scheduler config, float64; `eta` of the sampler is the noise level, `ddim` its SDE.

    Args:
        scheduler_config: of diffusers' `FlowMatchEulerDiscreteScheduler`.
        config: the sampler.
        tokens: patches of a latent, by which a scheduler with dynamic shifting moves its timesteps.
        even: before they are shifted the times are 1, 1 - 1/T, ..., 1/T, as most pipelines give them; else the
            scheduler's own.
        shift: of a pipeline whose dynamic shift is not linear in the number of patches.

    Raises:
        ValueError: an ancestral sampler, or more steps than the schedule keeps apart.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    sampler = "flow_sde" if config.sampler == "ddim" else config.sampler
    if sampler not in FLOW_SAMPLERS:
        raise ValueError(
            f"sampler={config.sampler!r} is no sampler of a flow-matching model; use one of {', '.join(FLOW_SAMPLERS)}"
        )
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler_config)
    total, steps = scheduler.config.num_train_timesteps, config.num_inference_steps
    if steps > total:
        raise ValueError(f"num_inference_steps={steps} is larger than the model's schedule; use at most {total}")
    scheduler.set_timesteps(steps, **flow_timestep_arguments(scheduler.config, steps, tokens, even=even, shift=shift))
    make = partial(flow_table, scheduler.sigmas.double(), num_train_timesteps=total, sampler=sampler)
    noisy = make(noise_level=config.eta, sigma_min=config.sigma_min)
    return noisy if config.noisy_steps is None else windowed(noisy, make(noise_level=0.0), config.noisy_steps)


def flow_timestep_arguments(
    config: Any, steps: int, tokens: int, *, even: bool = False, shift: float | None = None
) -> dict[str, Any]:
    """What a pipeline tells the scheduler of `config` besides the number of steps; arguments as `flow_step_table`."""
    told: dict[str, Any] = {"sigmas": np.linspace(1.0, 1 / steps, steps)} if even else {}
    if config["use_dynamic_shifting"]:
        told["mu"] = _linear_shift(config, tokens) if shift is None else shift
    return told


def _linear_shift(config: Any, tokens: int) -> float:
    """Dynamic shift of the timesteps, linear in the number of patches, as in diffusers' pipelines."""
    low, shortest = config["base_shift"], config["base_image_seq_len"]
    if config["max_image_seq_len"] == shortest:
        raise ValueError(
            f"max_image_seq_len={shortest!r} in scheduler/scheduler_config.json must differ from base_image_seq_len, "
            "between which dynamic shifting is linear; write what the model was trained with"
        )
    slope = (config["max_shift"] - low) / (config["max_image_seq_len"] - shortest)
    return float(low + slope * (tokens - shortest))
