"""Writes pipelines and adapters so that others read them: the only place where weights leave in diffusers' layout."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from diffusion_gym.models.quiet import quiet
from diffusion_gym.storage import load_tensors, read_json, save_tensors, tensors_metadata, write_folder, write_json

_COMPILED: Final = re.compile(r"(^|\.)_orig_mod(?=\.)")  # what torch.compile puts into the names
_TEXT: Final = "text_model."  # before each name, as transformers from 4 to 5.5 needs it and later ones take it


def export_pipeline(folder: str | Path, pipeline: Any, tokenizer_files: Mapping[str, bytes] | None = None) -> None:
    """Write a pipeline of diffusers; over an older one file by file, so that whoever has that loaded keeps it.

    Args:
        folder: where to.
        pipeline: any pipeline of diffusers; its networks may be compiled.
        tokenizer_files: the files of its tokenizers by `part/name`, which are written in place of what transformers
            makes of them: transformers 5 leaves out the vocabulary that transformers 4 reads.
    """

    def write(place: Path) -> None:
        with quiet():
            pipeline.save_pretrained(place)
        for part in {name.split("/")[0] for name in tokenizer_files or ()}:
            if (place / part).is_dir():
                shutil.rmtree(place / part)
                (place / part).mkdir()
        for name, content in (tokenizer_files or {}).items():
            if (place / name).parent.is_dir():
                (place / name).write_bytes(content)
        rename_weights(place)

    write_folder(folder, write)


def export_adapters(
    folder: str | Path,
    pipeline: Any,
    part: str,
    unet: nn.Module,
    renamed: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = dict,
) -> None:
    """Write the adapters of `unet` so that `load_lora_weights` of a class of diffusers' pipelines reads them.

    The file says their alpha: without it diffusers takes the rank, and says nothing.

    Args:
        folder: where to.
        pipeline: the class.
        part: what `save_lora_weights` of the class calls the network: `unet` or `transformer`.
        unet: the network; may be compiled.
        renamed: from peft's names to the class's.
    """
    from peft.utils import get_peft_model_state_dict

    config = unet.peft_config["default"]  # type: ignore[index, union-attr]
    described = {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": sorted(config.target_modules)}
    layers = {
        f"{part}_lora_layers": renamed(get_peft_model_state_dict(unet)),
        f"{part}_lora_adapter_metadata": described,
    }

    def write(place: Path) -> None:
        with quiet():
            pipeline.save_lora_weights(str(place), safe_serialization=True, **layers)
        rename_weights(place)

    write_folder(folder, write)


def rename_weights(folder: Path) -> None:
    """Give the weights in a folder and below it the names that all versions of diffusers and transformers read."""
    for path in [*folder.rglob("*.safetensors"), *folder.rglob("*.safetensors.index.json")]:
        prefix = _TEXT if _is_text_model(path.parent) else ""
        if path.suffix == ".json":
            index = read_json(path)
            renamed = {_readable(name, prefix): file for name, file in index["weight_map"].items()}
            write_json(path, {**index, "weight_map": renamed})
        elif any(name != _readable(name, prefix) for name in _names(path)):
            tensors = {_readable(name, prefix): value for name, value in load_tensors(path).items()}
            save_tensors(path, tensors, tensors_metadata(path))


def _readable(name: str, prefix: str) -> str:
    return prefix + _COMPILED.sub("", name).removeprefix(".").removeprefix(prefix)


def _is_text_model(folder: Path) -> bool:
    path = folder / "config.json"
    return path.is_file() and read_json(path).get("architectures") == ["CLIPTextModel"]


def _names(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        return list(file.keys())
