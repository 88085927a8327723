"""Files that are never half written: safetensors and JSON, no pickle."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import math
import os
import re
import shutil
import stat
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from diffusion_gym.devices import put

_UNFINISHED = ".unfinished"
_DATA, _TENSORS = "diffusion_gym.json", "tensors.safetensors"  # in an archive
_LEVELS: Final = 100  # of JSON; Python's own limit is about 1,000 calls, of which a copy takes several a level
# What a pipeline's loader would take; of two kinds it takes the shards, however old.
_PIPELINE_WEIGHTS = re.compile(r"(model|diffusion_pytorch_model)(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a temporary file beside `path`, then put it in place in one step.

    The file gets the permissions of the umask, also where `write` uses a library that gives others. Where `path` is a
    link, the file that it leads to is replaced.

    Raises:
        OSError: the disk is full or not writable; what was at `path` is still there, untouched.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _unfinished(path)
    mode = _create(temporary)
    try:
        write(temporary)
        _settle(temporary, mode)
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_folder(folder: str | Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder, then put its files in place, with the permissions of the umask.

    A new folder appears in one step. In one that exists each file is replaced in one step, so that whoever has the old
    file open or mapped keeps the old bytes; old weights beside new ones are removed, other files stay.

    Raises:
        OSError: the disk is full or not writable, or a file is at `folder`; while `write` runs, `folder` is untouched.
    """
    folder = Path(os.path.realpath(folder))
    new = not folder.exists()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = _unfinished(folder if new else folder / "files")
    temporary.mkdir()
    try:
        write(temporary)
        probe = _unfinished(temporary / "mode")
        mode = _create(probe)
        probe.unlink()
        for place, _, names in os.walk(temporary):
            for name in names:
                _settle(Path(place, name), mode)
            _sync_folder(Path(place))
        if new:
            temporary.replace(folder)
        else:
            _move_files(temporary, folder)
        _sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _unfinished(path: Path) -> Path:
    """A new name beside `path`, of the kind that `is_unfinished` knows."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{_UNFINISHED}")


def _create(path: Path) -> int:
    """Make an empty file; returns the permissions that the umask gave it."""
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)


def _settle(path: Path, mode: int) -> None:
    """Flush a written file to the disk and give it its permissions."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    path.chmod(mode)


def _sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, where the file system can; the files themselves are flushed already."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _move_files(source: Path, folder: Path) -> None:
    """Move the files below `source` over those in `folder`, sub-folders first, and remove old weights beside new."""
    for place, _, names in os.walk(source, topdown=False):
        target = folder / Path(place).relative_to(source)
        target.mkdir(parents=True, exist_ok=True)
        for name in names:
            Path(place, name).replace(target / name)
        if any(name.endswith(".safetensors") for name in names):
            stale = {path.name for path in target.iterdir() if _PIPELINE_WEIGHTS.fullmatch(path.name)}.difference(names)
            for name in stale:
                (target / name).unlink()
        _sync_folder(target)


def is_unfinished(path: Path) -> bool:
    """Whether a path is named as those are that a kill during `write_atomically` or `write_folder` leaves."""
    return path.name.startswith(".") and path.name.endswith(_UNFINISHED)


def remove_unfinished(folder: str | Path) -> None:
    """Remove what a kill during `write_atomically` or `write_folder` left in a folder or below it."""
    for path in [path for path in Path(folder).rglob(f"*{_UNFINISHED}") if is_unfinished(path)]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write bytes, atomically."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    write_atomically(path, write)


def write_text(path: str | Path, text: str) -> None:
    """Write text as UTF-8, atomically."""
    write_bytes(path, text.encode("utf-8"))


def append_line(path: str | Path, text: str) -> None:
    """Add a line at the end of a file and flush it to the disk; what a kill left of a line before it is taken away.

    Raises:
        OSError: the disk is full or not writable; the file is as it was.
    """
    path = Path(path)
    new = not path.exists()
    with path.open("ab+") as file:
        file.seek(0)
        end = file.read().rfind(b"\n") + 1
        file.truncate(end)
        try:
            file.write(text.encode("utf-8") + b"\n")
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise
    if new:
        _sync_folder(path.parent)


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


def parse_json(text: str | bytes | bytearray) -> Any:
    """The value of a JSON text from outside.

    Raises:
        ValueError: it is not JSON, nested so deep that Python might not copy or write it, or has half a character.
    """
    too_deep = ValueError(f"it is nested more than {_LEVELS} levels deep")
    try:
        value = json.loads(text)
    except RecursionError:
        raise too_deep from None
    level = [value]
    for _ in range(_LEVELS + 1):
        for part in level:
            if isinstance(part, str) and not part.isascii():  # of megabytes that is known at once
                _require_whole_characters(part)
        level = [part for entry in level for part in _parts(entry)]
        if not level:
            return value
    raise too_deep


def _parts(value: Any) -> Iterable[Any]:
    return (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ()


def _require_whole_characters(text: str) -> None:
    """Refuse half of a surrogate pair, which an escape can stand for: no file, page or wire can take it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start : error.start + 1].encode("unicode-escape").decode()
        raise ValueError(f"a text of it has {half}, half of a character; write the whole character") from None


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: the file is not JSON.
    """
    try:
        return parse_json(Path(path).read_text(encoding="utf-8"))
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
    with _young_garbage():
        data = save(stored, dict(metadata or {}))
    write_bytes(path, data)


@contextlib.contextmanager
def _young_garbage() -> Iterator[None]:
    """Collect the cycles that are made within this context, at once.

    safetensors leaves one for each tensor. A collection in the middle of it would find them in use, and take them for
    objects that live long: a training with many checkpoints would keep them for hundreds of iterations.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
    gc.collect(0)


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


def restore_parameters(
    parameters: Mapping[str, torch.nn.Parameter], tensors: Mapping[str, torch.Tensor], owner: str
) -> None:
    """Put stored weights in place.

    Args:
        parameters: the weights that train, by name.
        tensors: what was stored of them.
        owner: what errors call the file.

    Raises:
        ValueError: the names or shapes are those of another policy; nothing has changed then.
    """
    if {name: value.shape for name, value in tensors.items()} != {k: v.shape for k, v in parameters.items()}:
        raise ValueError(
            f"{owner} holds the weights of another policy; check the model, trainable, lora_rank and, where there is "
            "one, the value network"
        )
    for name, parameter in parameters.items():
        put(parameter, tensors[name])


def joined(parts: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The tensors of several parts as one mapping, `"<part>.<name>"`; `part_of` reads a part back."""
    return {f"{part}.{name}": value for part, tensors in parts.items() for name, value in tensors.items()}


def part_of(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with `prefix.`, without it."""
    return {key.removeprefix(f"{prefix}."): v for key, v in tensors.items() if key.startswith(f"{prefix}.")}


def write_archive(path: str | Path | io.BufferedIOBase, content: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write JSON text and tensors as one zip file, atomically; `.zip` is added to a name without suffix."""
    from safetensors.torch import save

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
    from safetensors import SafetensorError
    from safetensors.torch import load

    source: Any = path
    if isinstance(path, str | Path):
        named = Path(path)
        source = io.BytesIO((named if named.exists() else named.with_suffix(".zip")).read_bytes())
    try:
        with zipfile.ZipFile(source) as archive:
            return parse_json(archive.read(_DATA)), load(archive.read(_TENSORS))
    except (zipfile.BadZipFile, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"path={str(path)!r} is truncated or no file that this package saved ({error})") from error
