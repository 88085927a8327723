"""Diffusion models by name; a model is loaded once a device and dtype, and shared."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from diffusion_gym.devices import device_called, numbered
from diffusion_gym.hub import located_file
from diffusion_gym.models.base import FAMILIES, MODELS, DenoisingModel, null_embedding
from diffusion_gym.models.cache import ModelCache
from diffusion_gym.registry import unknown_name
from diffusion_gym.storage import read_json

# These import peft, so they wait for their first use. A family imports no heavy library at its top.
_HEAVY: Final = {"initial", "lora"}
_OPTIONS: Final = ["revision", "variant"]
_CACHE: Final = ModelCache()

for _module in pkgutil.iter_modules(__path__):
    if _module.name not in _HEAVY:
        importlib.import_module(f"{__name__}.{_module.name}")


def load_model(
    model: str | Path | DenoisingModel,
    device: str | torch.device,
    dtype: str,
    model_kwargs: Mapping[str, str | None] | None = None,
) -> DenoisingModel:
    """The model of a name, directory or hub id.

    It is the same object for the same arguments while somebody holds it and its files stay as they are.

    The class of a directory or hub id is that of its `model_index.json`.

    Args:
        model: a name in `MODELS`, a diffusers directory, a hub id, or a model object, which is passed through.
        device: where its weights go.
        dtype: `float32`, `bfloat16` or `float16`.
        model_kwargs: `revision`, the branch, tag or commit of a hub id; `variant`, such as `fp16`, the weight files
            to take where there are several.

    Raises:
        ValueError: an unknown name, device, dtype or pipeline class; an option that is unknown or not the model's; or
            a field of the model's configs that changes the samples and is not followed.
        FileNotFoundError: the model's files are not here and cannot be fetched.
    """
    options = _checked_options(model_kwargs or {})
    if not isinstance(model, str | Path):
        if not hasattr(model, "step_table"):
            raise ValueError(f"model={model!r} is no name, directory, hub id or model object")
        if options:
            raise ValueError(f"model_kwargs={options!r} go with a name, directory or hub id, not with a model object")
        return model
    place, type_ = numbered(device_called(device)), torch_dtype(dtype)
    # A relative path means another folder once the process has moved.
    key = (str(model), os.path.abspath(model), place, type_, *sorted(options.items()))
    return _CACHE.get(key, lambda: _load(str(model), place, type_, options))


def torch_dtype(dtype: str) -> torch.dtype:
    """The type that a model's weights may have, by its name.

    Raises:
        ValueError: an unknown name.
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={dtype!r} must be one of float32, bfloat16, float16")
    found: torch.dtype = getattr(torch, dtype)
    return found


def _checked_options(model_kwargs: Mapping[str, str | None]) -> dict[str, str]:
    for name, value in model_kwargs.items():
        if name not in _OPTIONS:
            raise ValueError(unknown_name("model_kwargs", name, _OPTIONS))
        if value is not None and not (isinstance(value, str) and value):
            raise ValueError(f"model_kwargs[{name!r}]={value!r} must be a string, such as 'main' or 'fp16', or None")
    return {name: value for name, value in model_kwargs.items() if value is not None}


def _load(model: str, device: torch.device, dtype: torch.dtype, chosen: Mapping[str, Any]) -> DenoisingModel:
    if model in MODELS:
        loader = MODELS[model]
        parameters = inspect.signature(loader).parameters
        if not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
            if foreign := [name for name in chosen if name not in parameters]:
                raise ValueError(f"model_kwargs={foreign[0]!r} is no option of model={model!r}; leave it out")
        return loader(device=device, dtype=dtype, **chosen)
    if "/" not in model and not Path(model).is_dir():
        raise ValueError(unknown_name("model", model, MODELS.names()) + "; or pass a directory or a hub id")
    return _model_class(model, chosen.get("revision"))(model, device=device, dtype=dtype, **chosen)


def _model_class(model: str, revision: str | None) -> Any:
    """The class that loads a pipeline directory or hub id."""
    if Path(model).is_file():
        raise ValueError(
            f"model={model!r} is a single file; make a directory of it once with diffusers: "
            f"StableDiffusionPipeline.from_single_file({model!r}).save_pretrained('DIR'), and pass model='DIR'"
        )
    path = located_file(model, "model_index.json", argument="model", revision=revision)
    index = read_json(path)
    pipeline = index.get("_class_name") if isinstance(index, dict) else None
    if pipeline is None:
        raise ValueError(
            f"{path} names no pipeline in _class_name; pass a directory that diffusers' save_pretrained wrote"
        )
    if pipeline not in FAMILIES:
        raise ValueError(f"model={model!r} is a {pipeline}; use a model of {', '.join(FAMILIES)}")
    return FAMILIES[pipeline]


__all__ = ["FAMILIES", "MODELS", "DenoisingModel", "load_model", "null_embedding", "torch_dtype"]
