"""Stable Diffusion 1.x from the hub."""

from __future__ import annotations

from typing import Any, Final

import torch

from diffusion_gym.hub import MODEL_SOURCES
from diffusion_gym.models.base import MODELS, DenoisingModel

TRAITS: Final = ("prompt", "photo", "face")


@MODELS.register("SD14", traits=TRAITS)
def sd14(*, device: torch.device, dtype: torch.dtype, **options: str) -> DenoisingModel:
    """Stable Diffusion 1.4, the base model of the DDPO paper."""
    return _load("SD14", device, dtype, options)


@MODELS.register("SD15", traits=TRAITS)
def sd15(*, device: torch.device, dtype: torch.dtype, **options: str) -> DenoisingModel:
    """Stable Diffusion 1.5."""
    return _load("SD15", device, dtype, options)


def _load(name: str, device: torch.device, dtype: torch.dtype, options: dict[str, Any]) -> DenoisingModel:
    from diffusion_gym.models.latent import LatentModel

    return LatentModel(MODEL_SOURCES[name], device=device, dtype=dtype, name=name, **options)
