"""Google's unconditional pixel DDPMs, 256x256, which the thesis fine-tunes."""

from __future__ import annotations

from typing import Any

import torch

from diffusion_gym.hub import MODEL_SOURCES
from diffusion_gym.models.base import MODELS, DenoisingModel


@MODELS.register("CelebaHQ", traits=("photo", "face"))
def celebahq(*, device: torch.device, dtype: torch.dtype, **options: str) -> DenoisingModel:
    """Faces of celebrities."""
    return _load("CelebaHQ", device, dtype, options)


@MODELS.register("Church", traits=("photo",))
def church(*, device: torch.device, dtype: torch.dtype, **options: str) -> DenoisingModel:
    """Churches, from the outside (LSUN)."""
    return _load("Church", device, dtype, options)


@MODELS.register("Bedroom", traits=("photo",))
def bedroom(*, device: torch.device, dtype: torch.dtype, **options: str) -> DenoisingModel:
    """Bedrooms (LSUN)."""
    return _load("Bedroom", device, dtype, options)


def _load(name: str, device: torch.device, dtype: torch.dtype, options: dict[str, Any]) -> DenoisingModel:
    from diffusion_gym.models.pixel import PixelModel

    return PixelModel(MODEL_SOURCES[name], device=device, dtype=dtype, name=name, **options)
