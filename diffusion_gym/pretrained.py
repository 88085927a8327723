"""Loads networks of diffusers and transformers, and refuses files that do not hold just their weights."""

from __future__ import annotations

import contextlib
import re
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from diffusion_gym.quiet import quiet

Fingerprint = tuple[tuple[str, int, int], ...]
_BUFFERS = r"(^|\.)(position_ids|inv_freq)$"  # of older files; today's networks compute them


def fingerprint(folder: str | Path) -> Fingerprint:
    """Name, size and time of the last change of a file, or of those in a folder and its sub-folders, links followed."""
    found = []
    for path in (Path(folder), *Path(folder).glob("*"), *Path(folder).glob("*/*")):
        with contextlib.suppress(FileNotFoundError):  # a link to nowhere, or gone meanwhile
            state = path.stat()
            if not stat.S_ISDIR(state.st_mode):
                found.append((str(path.relative_to(folder)), state.st_size, state.st_mtime_ns))
    return tuple(sorted(found))


def load_network(
    kind: Any,
    folder: str | Path,
    *,
    argument: str,
    part: str = "",
    unused: str = "$^",
    absent: str = "$^",
    **options: Any,
) -> Any:
    """A network by `kind.from_pretrained`, with every weight from its files.

    Both libraries go on with random values for weights that the files lack, and say so in a warning at most.

    Args:
        kind: a class of diffusers or transformers.
        folder: where the files are.
        argument: what the user calls them, for errors, such as `model='PATH'`.
        part: the sub-folder.
        unused: pattern of names that the files may hold for nothing.
        absent: pattern of names that the files may lack, where nothing depends on their values.
        **options: further keywords of `from_pretrained`.

    Raises:
        ValueError: weights are missing, of no use, of another shape, whole or not finite; or the files cannot be read.
    """
    where = f"{argument}: {part}/" if part else f"{argument}: its folder"
    if part:
        options["subfolder"] = part
    unread = f"{where} cannot be loaded as {kind.__name__}"
    if not Path(folder, part, "config.json").is_file():  # transformers would take its class's own defaults
        raise ValueError(f"{unread} (it has no config.json)")
    whole = _whole_numbers(unread, Path(folder, part))
    try:
        with quiet():
            network, report = kind.from_pretrained(
                str(folder),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by their names
                local_files_only=True,
                **options,
            )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # many kinds, in two libraries; each means: not a folder of this network
        raise ValueError(f"{unread} ({_first_line(error)})") from error
    _require_all(where, kind, report, unused, absent)
    buffers = {_last(name) for name, _ in network.named_buffers()}  # transformers renames what is before
    if rounded := [name for name in _without(_BUFFERS, whole) if _last(name) not in buffers]:
        remedy = "which would be read as if they were the weights; save them again in a type of floats"
        raise ValueError(f"{where} {_listed('holds whole numbers at', rounded)}, {remedy}")
    _require_finite(where, network)
    return network


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _whole_numbers(unread: str, folder: Path) -> set[str]:
    """The names of integer tensors in the safetensors files of `folder`, all of which must be readable."""
    from safetensors import SafetensorError, safe_open

    found = set[str]()
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(str(path), framework="pt") as file:
                found |= {name for name in file.keys() if file.get_slice(name).get_dtype()[0] in "IU"}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"{unread} ({path.name} is truncated or no safetensors file: {error}); copy or download it again"
            ) from error
    return found


def _require_all(where: str, kind: Any, report: Mapping[str, Any], unused: str, absent: str) -> None:
    """Refuse files that are not just a network's weights; `report` is what the library says of them."""
    shapes = [f"{name} {tuple(had)} for {tuple(needed)}" for name, had, needed in report["mismatched_keys"]]
    problems = [
        _listed("lacks", _without(absent, report["missing_keys"])),
        _listed("holds for nothing", _without(f"{_BUFFERS}|{unused}", report["unexpected_keys"])),
        _listed("holds in another shape", shapes),
    ]
    if any(problems):
        library = kind.__module__.split(".")[0]
        raise ValueError(
            f"{where} holds not the weights of {kind.__name__}: it {'; it '.join(filter(None, problems))}; the files "
            f"are of another network, or of another version of {library}: save them again there with "
            f"save_pretrained, or install the {library} that wrote them"
        )


def _require_finite(where: str, network: Any) -> None:
    spoilt = [name for name, value in network.state_dict().items() if not bool(value.isfinite().all())]
    if spoilt:
        dtype = str(network.dtype).removeprefix("torch.")
        raise ValueError(
            f"{where} {_listed('holds NaN or infinite numbers at', spoilt)}, as {dtype}; take files that are whole, or "
            "a dtype that holds their numbers, such as float32"
        )


def _without(pattern: str, names: Collection[str]) -> list[str]:
    return sorted(name for name in names if not re.search(pattern, name))


def _listed(verb: str, names: Collection[str]) -> str:
    if not names:
        return ""
    first = sorted(names)[0]
    return f"{verb} {first!r}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
