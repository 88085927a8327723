"""Zip files of JSON and safetensors, in place of the pickles in Stable-Baselines3's."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from diffusion_gym.storage import parse_json, write_bytes

_DATA, _TENSORS = "diffusion_gym.json", "tensors.safetensors"


def write_archive(path: str | Path | io.BufferedIOBase, content: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write JSON text and tensors as one file, atomically; `.zip` is added to a name without suffix."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(_DATA, content)
        stored = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        archive.writestr(_TENSORS, save(stored))
    if isinstance(path, str | Path):
        path = Path(path)
        write_bytes(path if path.suffix else path.with_suffix(".zip"), data.getvalue())
    else:
        path.write(data.getvalue())


def read_archive(path: str | Path | io.BufferedIOBase) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What `write_archive` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is another, or truncated.
    """
    source: Any = path
    if isinstance(path, str | Path):
        named = Path(path)
        source = io.BytesIO((named if named.exists() else named.with_suffix(".zip")).read_bytes())
    try:
        with zipfile.ZipFile(source) as archive:
            return parse_json(archive.read(_DATA)), load(archive.read(_TENSORS))
    except (zipfile.BadZipFile, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"path={str(path)!r} is truncated or no file of DDPOPPO.save ({error})") from error
