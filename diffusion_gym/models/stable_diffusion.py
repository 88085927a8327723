"""Stable Diffusion 1.x from the hub."""

from __future__ import annotations

from typing import Final

import torch

from diffusion_gym.models.base import MODELS, DenoisingModel

HUB_IDS: Final = {"SD14": "CompVis/stable-diffusion-v1-4", "SD15": "stable-diffusion-v1-5/stable-diffusion-v1-5"}


@MODELS.register("SD14")
def sd14(*, device: torch.device, dtype: torch.dtype) -> DenoisingModel:
    """Stable Diffusion 1.4, the base model of the DDPO paper."""
    return _load("SD14", device, dtype)


@MODELS.register("SD15")
def sd15(*, device: torch.device, dtype: torch.dtype) -> DenoisingModel:
    """Stable Diffusion 1.5."""
    return _load("SD15", device, dtype)


def _load(name: str, device: torch.device, dtype: torch.dtype) -> DenoisingModel:
    from diffusion_gym.models.latent import LatentModel

    return LatentModel(HUB_IDS[name], device=device, dtype=dtype, name=name)
