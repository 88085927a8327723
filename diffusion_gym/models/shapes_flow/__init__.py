"""`ShapesFlow`: the small flow-matching transformer that ships inside the package, in Stable Diffusion 3's layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch

from diffusion_gym.models.base import MODELS, DenoisingModel

WEIGHTS: Final = Path(__file__).parent / "weights"
SAMPLER_DEFAULTS: Final[dict[str, Any]] = {"num_inference_steps": 10, "guidance_scale": 1.0, "eta": 0.7}


@MODELS.register("ShapesFlow", traits=("prompt", "shapes"))
def shapes_flow(*, device: torch.device, dtype: torch.dtype) -> DenoisingModel:
    """Load the embedded flow-matching model, which draws the scenes of `Shapes`."""
    from diffusion_gym.models.sd3 import SD3Model

    return SD3Model(
        WEIGHTS,
        device=device,
        dtype=dtype,
        name="ShapesFlow",
        sampler_defaults=SAMPLER_DEFAULTS,
        default_prompts="shapes-composition",
    )
