"""Diffusion models by name; a model is loaded once a device and dtype, and shared."""

from __future__ import annotations

import importlib
import pkgutil
from functools import lru_cache
from pathlib import Path

import torch

from diffusion_gym.models.base import MODELS, DenoisingModel
from diffusion_gym.registry import unknown_name

_HEAVY = {"latent", "lora", "sampling"}  # these import diffusers or peft, so they wait for their first use

for _module in pkgutil.iter_modules(__path__):
    if _module.name not in _HEAVY:
        importlib.import_module(f"{__name__}.{_module.name}")


def load_model(model: str | DenoisingModel, device: str | torch.device, dtype: str) -> DenoisingModel:
    """The model of a name, directory or hub id; the same object for the same arguments.

    Args:
        model: a name in `MODELS`, a diffusers directory, a hub id, or a model object, which is passed through.
        device: where its weights go.
        dtype: `float32`, `bfloat16` or `float16`.

    Raises:
        ValueError: an unknown name, device or dtype.
        FileNotFoundError: the model's files are not here and cannot be fetched.
    """
    if not isinstance(model, str | Path):
        if not hasattr(model, "step_table"):
            raise ValueError(f"model={model!r} is no name, directory, hub id or model object")
        return model
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={dtype!r} must be one of float32, bfloat16, float16")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is unknown; use 'cpu', 'cuda' or 'cuda:0'") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r} is not available here; use device='cpu'")
    return _load(str(model), place, getattr(torch, dtype))


@lru_cache(maxsize=8)
def _load(model: str, device: torch.device, dtype: torch.dtype) -> DenoisingModel:
    if model in MODELS:
        return MODELS[model](device=device, dtype=dtype)
    if "/" not in model and not Path(model).is_dir():
        raise ValueError(unknown_name("model", model, MODELS.names()) + "; or pass a directory or a hub id")
    from diffusion_gym.models.latent import LatentModel

    return LatentModel(model, device=device, dtype=dtype)


__all__ = ["MODELS", "DenoisingModel", "load_model"]
