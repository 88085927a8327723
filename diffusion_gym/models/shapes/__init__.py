"""`Shapes`: the small text-to-image model that ships inside the package, in Stable Diffusion's layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch

from diffusion_gym.models.base import MODELS, DenoisingModel

WEIGHTS: Final = Path(__file__).parent / "weights"
SAMPLER_DEFAULTS: Final[dict[str, Any]] = {"num_inference_steps": 20, "guidance_scale": 3.0}


@MODELS.register("Shapes", traits=("prompt", "shapes"))
def shapes(*, device: torch.device, dtype: torch.dtype) -> DenoisingModel:
    """Load the embedded model."""
    from diffusion_gym.models.latent import LatentModel

    return LatentModel(
        WEIGHTS,
        device=device,
        dtype=dtype,
        name="Shapes",
        sampler_defaults=SAMPLER_DEFAULTS,
        default_prompts="shapes-composition",
    )
