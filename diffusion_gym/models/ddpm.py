"""Google's unconditional pixel DDPMs, 256x256, which the thesis fine-tunes."""

from __future__ import annotations

import torch

from diffusion_gym.hub import MODEL_SOURCES
from diffusion_gym.models.base import MODELS, DenoisingModel

Name = str | None  # of a revision, or of a variant of the weights


@MODELS.register("CelebaHQ", traits=("photo", "face"))
def celebahq(
    *, device: torch.device, dtype: torch.dtype, revision: Name = None, variant: Name = None
) -> DenoisingModel:
    """Faces of celebrities."""
    return _load("CelebaHQ", device, dtype, revision, variant)


@MODELS.register("Church", traits=("photo",))
def church(*, device: torch.device, dtype: torch.dtype, revision: Name = None, variant: Name = None) -> DenoisingModel:
    """Churches, from the outside (LSUN)."""
    return _load("Church", device, dtype, revision, variant)


@MODELS.register("Bedroom", traits=("photo",))
def bedroom(*, device: torch.device, dtype: torch.dtype, revision: Name = None, variant: Name = None) -> DenoisingModel:
    """Bedrooms (LSUN)."""
    return _load("Bedroom", device, dtype, revision, variant)


def _load(name: str, device: torch.device, dtype: torch.dtype, revision: Name, variant: Name) -> DenoisingModel:
    from diffusion_gym.models.pixel import PixelModel

    source = MODEL_SOURCES[name]
    return PixelModel(source, device=device, dtype=dtype, name=name, revision=revision, variant=variant)
