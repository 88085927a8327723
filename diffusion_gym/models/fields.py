"""Which values of somebody else's config we honour; any other is refused, never skipped in silence.

The class that reads a config (a network of diffusers, a scheduler) honours its own fields. The tables here hold the
fields that change what a *pipeline* does with it, by file: what the pipelines of diffusers 0.42 read, and what none
of our samplers follows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field

from diffusion_gym.schemas import Count, Positive, checked
from diffusion_gym.storage import read_json

Allowed = Mapping[str, Any]
"""By field the values that we honour as a tuple, the one that a file without the field means first; or its type, of
which any value is honoured; or None for any value at all."""


def check_fields(model: str, file: str, config: Mapping[str, Any], allowed: Allowed, *, complete: bool = False) -> None:
    """Refuse a config of which a field has a value that we do not honour.

    Args:
        model: what the model is called.
        file: the config's path in the model's folder.
        config: what the file says; fields that begin with `_` are notes.
        allowed: the values that we honour.
        complete: whether `allowed` knows all fields, so that another one is refused too unless it is None or False.

    Raises:
        ValueError: a field's value is not honoured, or not of the field's type.
    """
    for name, value in config.items():
        if name.startswith("_") or (name not in allowed and (not complete or value is None or value is False)):
            continue
        values = allowed.get(name, ())
        if values is not None and not isinstance(values, tuple):
            checked(values, value, f"model={model!r}: {file}, {name}", "write what the model was trained with")
            continue
        if values is None or any(value == other for other in values):
            continue
        wanted = f"use one of {', '.join(map(repr, values))}" if values else "leave it out"
        raise ValueError(
            f"model={model!r}: {file} has {name}={value!r}, which changes the samples in a way that is not followed "
            f"here; {wanted} if the model allows it, else another model"
        )


def absent_parts(optional: Iterable[str], index: Mapping[str, Any]) -> list[str]:
    """Those of the optional parts that a pipeline with this `model_index.json` goes without."""
    return [part for part in optional if (index.get(part) or (None, None))[1] is None]


def check_parts(model: str, folder: str | Path, parts: Mapping[str, Allowed]) -> None:
    """`check_fields` for the configs of several parts of a pipeline's folder, those that are there.

    Args:
        model: what the model is called.
        folder: the pipeline's folder.
        parts: the honoured values by the part's folder, such as `unet`.

    Raises:
        ValueError: a field's value is not honoured.
    """
    for part, allowed in parts.items():
        if (path := Path(folder, part, "config.json")).is_file():
            check_fields(model, f"{part}/config.json", read_config(model, path), allowed)


def read_config(model: str, path: Path) -> dict[str, Any]:
    """What a config file of a model says.

    Raises:
        ValueError: there is no such file, or it holds no JSON object.
    """
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise ValueError(f"model={model!r}: {path.parent.name}/{path.name} {reason}") from error
    if not isinstance(config, dict):
        raise ValueError(f"model={model!r}: {path.parent.name}/{path.name} holds no JSON object, but {config!r}")
    return config


def check_index(model: str, index: Mapping[str, Any], allowed: Allowed) -> None:
    """`check_fields` for the options of a pipeline; the lists in its `model_index.json` are parts, no options."""
    options = {name: value for name, value in index.items() if not isinstance(value, list)}
    check_fields(model, "model_index.json", options, allowed, complete=True)


_OFF: Final = (False, None)
_ABOVE_ZERO: Final = Annotated[float, Field(gt=0)]

# --- networks: what the pipeline gives them, and what it does to their output --------------------------------------

# Conditions on more than a text: a class, a picture, a region's boxes.
UNET: Final[Allowed] = {
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "encoder_hid_dim_type": (None, "text_proj"),
    "addition_embed_type": (None, "text"),
}
XL_UNET: Final[Allowed] = {**UNET, "addition_embed_type": ("text_time", None, "text")}
# What a pipeline does not apply to the latents before it decodes them, although the autoencoder was trained with it.
SCALED: Final[Allowed] = {"scaling_factor": _ABOVE_ZERO}
VAE: Final[Allowed] = {**SCALED, "shift_factor": (None, 0.0), "latents_mean": (None,), "latents_std": (None,)}
XL_VAE: Final[Allowed] = {**SCALED, "shift_factor": (None, 0.0)}
FLOW_VAE: Final[Allowed] = {**SCALED, "latents_mean": (None,), "latents_std": (None,)}
TEXT_ENCODER: Final[Allowed] = {"use_attention_mask": _OFF}

# --- pipelines: the options in `model_index.json` ------------------------------------------------------------------

# The safety checker is left out and pictures get no watermark: rewards see what the model makes.
INDEX: Final[Allowed] = {"requires_safety_checker": None}
XL_INDEX: Final[Allowed] = {
    "force_zeros_for_empty_prompt": (True, False, None),
    "add_watermarker": None,
    "requires_aesthetics_score": _OFF,
}
PLAIN_INDEX: Final[Allowed] = {}

# --- schedulers ----------------------------------------------------------------------------------------------------

# How a scheduler integrates: DDIM or DDPM, or Euler's method for a flow, stands in its place.
_SOLVER: Final = (
    *("skip_prk_steps", "solver_order", "predictor_order", "corrector_order", "algorithm_type", "solver_type"),
    *("lower_order_final", "euler_at_final", "predict_x0", "disable_corrector", "solver_p", "tau_func"),
    *("interpolation_type", "original_inference_steps", "timestep_scaling", "noise_sampler_seed"),
    *("dynamic_thresholding_ratio", "sample_max_value"),  # of thresholding, which is refused
    *("time_shift_type", "flow_shift"),  # of flows, which only FLOW_SCHEDULER reads
    "tensor_format",  # of versions before 0.5
)
VARIANCE_PRESERVING: Final[Allowed] = {
    **dict.fromkeys(_SOLVER),
    # What diffusers' DDIM and DDPM schedulers read.
    **dict.fromkeys(("rescale_betas_zero_snr", "clip_sample", "clip_sample_range", "set_alpha_to_one")),
    "num_train_timesteps": Positive,
    "beta_start": float,
    "beta_end": float,
    "trained_betas": list[float] | None,
    "steps_offset": Count,
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", None),
    # Other noise levels, or steps that are no Gaussian.
    "thresholding": _OFF,
    **dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"), _OFF),
    **dict.fromkeys(("use_flow_sigmas", "use_dynamic_shifting"), _OFF),
    **dict.fromkeys(("sigma_min", "sigma_max", "shift_terminal"), (None,)),
    "final_sigmas_type": ("zero", None),
    "lambda_min_clipped": (-math.inf, None),
    "timestep_type": ("discrete", None),
    "predict_epsilon": (True, None),
}
FLOW_SCHEDULER: Final[Allowed] = {
    # What diffusers' FlowMatchEulerDiscreteScheduler reads.
    "num_train_timesteps": Positive,
    "shift": _ABOVE_ZERO,
    **dict.fromkeys(("use_dynamic_shifting", "base_shift", "max_shift")),
    **dict.fromkeys(("base_image_seq_len", "max_image_seq_len", "shift_terminal", "time_shift_type")),
    **dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")),
    # The data's end of the flow at t = 1, noise of the scheduler's own, pictures that grow on the way.
    "invert_sigmas": _OFF,
    "stochastic_sampling": _OFF,
    "scale_factors": (None,),
    "upscale_mode": None,
}
# Multistep solvers of a flow: their betas and spacing are not read.
FLOW_SOLVER: Final[Allowed] = {
    **VARIANCE_PRESERVING,
    **dict.fromkeys(("beta_schedule", "beta_start", "beta_end", "timestep_spacing", "lambda_min_clipped")),
    **dict.fromkeys(("use_dynamic_shifting", "shift_terminal")),
    "use_flow_sigmas": (True,),
    "prediction_type": ("flow_prediction",),
}
