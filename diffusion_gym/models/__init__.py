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
from diffusion_gym.models.base import (
    ADAPTER_FILES,
    ATTENTION,
    FAMILIES,
    MODELS,
    DenoisingModel,
    null_embedding,
    sampling_table,
)
from diffusion_gym.models.cache import ModelCache
from diffusion_gym.registry import unknown_name
from diffusion_gym.storage import read_json

# These import diffusers or peft, so they wait for their first use. A family imports no heavy library at its top.
_HEAVY: Final = {"initial", "lora", "solvers"}
_LOADED: Final = (
    "revision",
    "variant",
    "text_encoder_device",
    "embedding_cache",
    "network_device",
)  # options by which weights are loaded
_SHARED: Final = ("height", "width", "negative_prompt")  # by which models differ that share their weights
OPTIONS: Final = (*_LOADED, *_SHARED)
_CACHE: Final = ModelCache()

for _module in pkgutil.iter_modules(__path__):
    if _module.name not in _HEAVY:
        importlib.import_module(f"{__name__}.{_module.name}")


def load_model(
    model: str | Path | DenoisingModel,
    device: str | torch.device,
    dtype: str,
    model_kwargs: Mapping[str, Any] | None = None,
) -> DenoisingModel:
    """The model of a name, directory or hub id.

    It is the same object for the same arguments while somebody holds it and its files stay as they are. Models that
    differ in size or negative prompt alone share their weights.

    The class of a directory or hub id is that of its `model_index.json`.

    Args:
        model: a name in `MODELS`, a diffusers directory, a hub id, or a model object, which is passed through.
        device: where its weights go.
        dtype: `float32`, `bfloat16` or `float16`.
        model_kwargs: those of `OPTIONS`: `revision`, the branch, tag or commit of a hub id; `variant`, such as `fp16`,
            the weight files to take where there are several; `text_encoder_device`, by default the model's;
            `embedding_cache`, a folder that keeps the embeddings of prompts, by default none; `network_device`, where
            the network of a pipeline is loaded that sharding spreads over processes from there; `height` and `width`
            of its pictures in pixels, by default the pipeline's; `negative_prompt`, which guidance pushes away from,
            by default the empty one.

    Raises:
        ValueError: an unknown name, device, dtype or pipeline class; an option that is unknown or not the model's; or
            a field of the model's configs that changes the samples and is not followed.
        FileNotFoundError: the model's files are not here and cannot be fetched.
    """
    options = _checked_options(model_kwargs or {})
    shared: dict[str, Any] = {name: options.pop(name) for name in _SHARED if name in options}
    if not isinstance(model, str | Path):
        if not hasattr(model, "step_table"):
            raise ValueError(f"model={model!r} is no name, directory, hub id or model object")
        if options:
            raise ValueError(f"model_kwargs={options!r} go with a name, directory or hub id, not with a model object")
        return _with_options(model, shared)
    place, type_ = numbered(device_called(device)), torch_dtype(dtype)
    # A relative path means another folder once the process has moved.
    key = (str(model), os.path.abspath(model), place, type_, *sorted(options.items()))
    whole = _CACHE.get(key, lambda: _load(str(model), place, type_, options))
    if not shared:
        return whole
    return _CACHE.get((*key, *sorted(shared.items())), lambda: _with_options(whole, shared))


def _with_options(model: DenoisingModel, shared: Mapping[str, Any]) -> DenoisingModel:
    if not shared:
        return model
    make = getattr(model, "with_options", None)
    if make is None:
        [name, value], *_ = shared.items()
        raise ValueError(f"{name}={value!r} is no option of model={model.name!r}, which has none; leave it out")
    made: DenoisingModel = make(**shared)
    return made


def torch_dtype(dtype: str) -> torch.dtype:
    """The type that a model's weights may have, by its name.

    Raises:
        ValueError: an unknown name.
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={dtype!r} must be one of float32, bfloat16, float16")
    found: torch.dtype = getattr(torch, dtype)
    return found


def _checked_options(model_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in model_kwargs.items():
        if name not in OPTIONS:
            raise ValueError(unknown_name("model_kwargs", name, list(OPTIONS)))
        if name in _LOADED and value is not None and not (isinstance(value, str) and value):
            raise ValueError(f"model_kwargs[{name!r}]={value!r} must be a string, such as 'main' or 'fp16', or None")
        if name == "negative_prompt" and not isinstance(value, str | None):
            raise ValueError(f"negative_prompt={value!r} must be a string")
    return {name: value for name, value in model_kwargs.items() if value is not None}


def _load(model: str, device: torch.device, dtype: torch.dtype, chosen: Mapping[str, Any]) -> DenoisingModel:
    if model not in MODELS:
        if "/" not in model and not Path(model).is_dir():
            raise ValueError(unknown_name("model", model, MODELS.names()) + "; or pass a directory or a hub id")
        loader = _model_class(model, chosen.get("revision"))
        found: DenoisingModel = loader(model, device=device, dtype=dtype, **_accepted(model, loader, chosen))
        return found
    return MODELS[model](device=device, dtype=dtype, **_accepted(model, MODELS[model], chosen))


def has_own_sampler(model: object) -> bool:
    """Whether the family of a model, by name or directory, has defaults of its own for `SamplerConfig`.

    Where that cannot be told without loading the model, as of a hub id, or it is no model, it is False.
    """
    if not isinstance(model, str):
        return False
    if model in MODELS:
        family = getattr(MODELS[model], "func", None)
    else:
        path = Path(model, "model_index.json")
        pipeline = _pipeline(path) if path.is_file() else None
        family = FAMILIES[pipeline] if pipeline is not None and pipeline in FAMILIES else None
    return bool(getattr(family, "SAMPLER_DEFAULTS", {}))


def _accepted(model: str, loader: Any, chosen: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options, none of which a loader may lack, but for the way that a large network takes to its device."""
    parameters = inspect.signature(loader).parameters
    if "network_device" not in parameters:
        chosen = {name: value for name, value in chosen.items() if name != "network_device"}
    if not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
        if foreign := [name for name in chosen if name not in parameters]:
            raise ValueError(f"{foreign[0]}={chosen[foreign[0]]!r} is no option of model={model!r}; leave it out")
    return chosen


def _pipeline(index: str | Path) -> str | None:
    """The pipeline's class that a `model_index.json` names, if it does."""
    stored = read_json(index)
    named = stored.get("_class_name") if isinstance(stored, dict) else None
    return named if isinstance(named, str) else None


def _model_class(model: str, revision: str | None) -> Any:
    """The class that loads a pipeline directory or hub id."""
    place = Path(model)
    if place.name == "model_index.json":
        raise ValueError(f"model={model!r} is a file of a pipeline directory; pass the directory {str(place.parent)!r}")
    if any((place / name).is_file() for name in ADAPTER_FILES) and not (place / "model_index.json").is_file():
        raise ValueError(
            f"model={model!r} holds adapters alone; pass the model that they adapt, and init_from={model!r} to an agent"
        )
    if place.is_file():
        raise ValueError(
            f"model={model!r} is a single file; make a directory of it once with diffusers: "
            f"StableDiffusionPipeline.from_single_file({model!r}).save_pretrained('DIR'), and pass model='DIR'"
        )
    path = located_file(model, "model_index.json", argument="model", revision=revision)
    pipeline = _pipeline(path)
    if pipeline is None:
        raise ValueError(
            f"{path} names no pipeline in _class_name; pass a directory that diffusers' save_pretrained wrote"
        )
    if pipeline not in FAMILIES:
        raise ValueError(f"model={model!r} is a {pipeline}; use a model of {', '.join(FAMILIES)}")
    return FAMILIES[pipeline]


__all__ = [
    "ATTENTION",
    "FAMILIES",
    "MODELS",
    "OPTIONS",
    "DenoisingModel",
    "load_model",
    "null_embedding",
    "has_own_sampler",
    "sampling_table",
    "torch_dtype",
]
