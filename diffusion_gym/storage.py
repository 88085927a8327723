"""Files that are never half written: safetensors and JSON, no pickle."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

_UNFINISHED = ".unfinished"


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a temporary file beside `path`, then put it in place in one step.

    Raises:
        OSError: the disk is full or not writable; what was at `path` is still there, untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_UNFINISHED)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def is_unfinished(path: Path) -> bool:
    """Whether a path is named as the temporary files are that a kill during `write_atomically` leaves."""
    return path.name.startswith(".") and path.name.endswith(_UNFINISHED)


def remove_unfinished(folder: str | Path) -> None:
    """Remove the temporary files that a kill during `write_atomically` left in a folder or below it."""
    for path in Path(folder).rglob(f"*{_UNFINISHED}"):
        if is_unfinished(path):
            path.unlink(missing_ok=True)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write bytes, atomically."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    write_atomically(path, write)


def write_text(path: str | Path, text: str) -> None:
    """Write text as UTF-8, atomically."""
    write_bytes(path, text.encode("utf-8"))


def json_text(value: Any, *, indent: int | None = None) -> str:
    """`value` as JSON that every program reads; a number that is not finite, which JSON has not, is null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def exact_json(value: Any) -> str:
    """`value` as JSON that reads back as the same numbers: what a program goes on from.

    Raises:
        ValueError: a number in it is not finite.
    """
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"a number of what is to be stored is not finite ({error})") from error


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number_or_nan(value: float | None) -> float:
    """A number that `json_text` wrote; null is NaN."""
    return math.nan if value is None else float(value)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; see `json_text`."""
    write_text(path, json_text(value, indent=2) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: the file is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file ({error}); it may be truncated or from another program") from error


def save_tensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors, and strings in the header, as one safetensors file, atomically."""
    from safetensors.torch import save

    stored: dict[str, torch.Tensor] = {}
    memory: set[int] = set()
    for key, value in tensors.items():
        value = value.detach().contiguous().cpu()
        address = value.untyped_storage().data_ptr()
        stored[key] = value.clone() if address in memory else value  # safetensors refuses tensors that share memory
        memory.add(address)
    # Serialised in memory: save_file would map the file, and a full disk would then kill the process.
    write_bytes(path, save(stored, dict(metadata or {})))


def load_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Read named tensors from a safetensors file, to the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated or no safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(Path(path).read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error})") from error


def tensors_metadata(path: str | Path) -> dict[str, str]:
    """The strings in the header of a safetensors file that `load_tensors` can read."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        return file.metadata() or {}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimiser's state as named tensors `"<parameter index>.<name>"`."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": torch.as_tensor(value) for index, row in state.items() for name, value in row.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put back what `optimizer_tensors` gave; learning rates and the like stay the optimiser's own."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
