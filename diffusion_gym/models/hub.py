"""Finds a model's files: a local directory, the hub's cache, or the hub itself; never a long wait."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_HUB_SECONDS = 2.0  # patience with a hub that may not be there


def located(source: str, parts: Sequence[str]) -> str:
    """The local directory that holds `source`, fetched from the hub if it can be reached.

    Args:
        source: a pipeline directory, or a hub id such as `CompVis/stable-diffusion-v1-4`.
        parts: the sub-folders that the pipeline needs.

    Raises:
        FileNotFoundError: the directory lacks a part; or the id is not cached and the hub cannot be reached.
    """
    if Path(source).is_dir():
        missing = [part for part in parts if not (Path(source) / part).is_dir()]
        if missing:
            raise FileNotFoundError(
                f"model={source!r} lacks {', '.join(missing)}/; pass a directory that diffusers' save_pretrained wrote"
            )
        return source
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise FileNotFoundError(
            f"model={source!r} is no directory here and no hub id of the form 'owner/name'; pass one of the two"
        )
    return _from_hub(source, parts)


def _from_hub(source: str, parts: Sequence[str]) -> str:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = ["model_index.json", *(f"{part}/*" for part in parts)]
    options: dict[str, Any] = {
        "allow_patterns": patterns,
        "ignore_patterns": ["*.bin", "*.ckpt", "*.msgpack", "*.onnx*", "*fp16*"],
    }
    try:
        cached = snapshot_download(source, local_files_only=True, **options)
        if all((Path(cached) / part).is_dir() for part in parts):
            return cached
    except LocalEntryNotFoundError:
        pass
    reason = "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        try:
            HfApi().model_info(source, timeout=_HUB_SECONDS)
            return snapshot_download(source, **options)
        except Exception as error:  # the hub's client raises many kinds; each means: not to be had now
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
    raise FileNotFoundError(
        f"model={source!r} is not in the local cache and the hub gave nothing ({reason}); fetch it where there is a "
        f"network with `hf download {source}`, or pass a local pipeline directory as model='PATH'"
    )
