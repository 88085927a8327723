"""Which files of a repository are needed, and whether a folder holds them; no network in here."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

_SMALL: Final = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TOKENIZERS: Final = ("tokenizer", "vocab", "merges", "spm", "spiece", "preprocessor", "processor")
_STEM: Final = r"(?:model|diffusion_pytorch_model)"
_SHARD: Final = r"(?:-\d+-of-\d+)?"
# `model.safetensors`, `model.fp16.safetensors`, and either one in shards, whose numbers come before or after `fp16`.
_WEIGHTS: Final = re.compile(rf"{_STEM}{_SHARD}(?:\.(?P<variant>\w+){_SHARD})?\.safetensors")
_INDEX: Final = re.compile(rf"{_STEM}\.safetensors\.index(?:\.(?P<variant>\w+))?\.json")


class UnfitFiles(FileNotFoundError):
    """What is wrong with a repository or directory: the end of a sentence that begins with its name."""


def needed_files(
    names: Sequence[str],
    parts: Sequence[str] = (),
    *,
    optional: Sequence[str] = (),
    variant: str | None = None,
    weights: bool = True,
) -> list[str]:
    """The files of a repository that are to be fetched: safetensors, configs and tokenizers, never a pickle.

    Args:
        names: all files of the repository.
        parts: sub-folders that are needed; empty for the files at the top.
        optional: sub-folders that are taken where they are.
        variant: such as `fp16`: a folder's weights of that kind, where it has such.
        weights: False for configs and tokenizers alone.

    Raises:
        UnfitFiles: a part is missing, its weights are of another kind, or no part has the variant.
    """
    folders: dict[str, list[str]] = defaultdict(list)
    for name in names:
        folder, _, file = name.rpartition("/")
        folders[folder].append(file)
    if missing := [part for part in parts if part not in folders]:
        raise UnfitFiles(f"lacks {', '.join(missing)}/")
    chosen = [name for name in names if parts and name == "model_index.json"]
    places = (*(parts or ("",)), *(each for each in optional if each in folders))
    if weights:
        refuse_unknown_variant((file for folder in places for file in folders[folder]), variant)
    for folder in places:
        files = folders[folder]
        wanted = [file for file in files if file.endswith(_SMALL) and not _INDEX.fullmatch(file)]
        if weights:
            refuse_other_weights(files, folder, variant)
            wanted += _weights(files, variant)
        chosen += [f"{folder}/{file}" if folder else file for file in wanted]
    return chosen


def lacks(
    folder: str | Path, parts: Sequence[str] = (), *, variant: str | None = None, weights: bool = True
) -> str | None:
    """What a folder of the cache lacks, or None; an interrupted download leaves configs without weights.

    Args:
        folder: the folder.
        parts: sub-folders that must be there; empty for the top.
        variant: as in `needed_files`.
        weights: whether weights must be there, at the top or beside a `config.json`.
    """
    has_variant = not (weights and variant)
    for part in parts or ("",):
        place = Path(folder, part)
        files = [path.name for path in place.iterdir()] if place.is_dir() else []
        if not files:
            return f"{part}/"
        if not weights and not any(file.startswith(_TOKENIZERS) for file in files):
            return f"{part}/tokenizer_config.json".removeprefix("/")
        found = _weights(files, variant) if weights else []
        if weights and not found and (not part or "config.json" in files):
            return f"{part}/*.safetensors".removeprefix("/")
        if missing := _named_in_indexes(place, found).difference(files):
            return f"{part}/{min(missing)}".removeprefix("/")
        has_variant = has_variant or variant in _variants(files)
    return None if has_variant else f"*.{variant}.safetensors"


def refuse_other_weights(files: Iterable[str], folder: str, variant: str | None = None) -> None:
    """Refuse a network's folder whose weights are pickles only, or of another variant only.

    Args:
        files: the names of its files.
        folder: what it is called.
        variant: the variant that is asked for.

    Raises:
        UnfitFiles: it is such.
    """
    files, where = list(files), f"{folder}/" if folder else "its top folder"
    if "config.json" not in files or _weights(files, variant):
        return
    if others := _variants(files):
        raise UnfitFiles(f"has weights in {where} of variant {others[0]!r} only; pass variant={others[0]!r}")
    if pickles := [file for file in files if file.endswith(_PICKLES)]:
        raise UnfitFiles(
            f"holds its weights in {where} as a pickle only ({pickles[0]}), which is not read, since it can run code; "
            "convert it where you trust it: from_pretrained(..., use_safetensors=False), save_pretrained('PATH'), and "
            "pass PATH; or pass a revision that has safetensors"
        )


def refuse_unknown_variant(files: Iterable[str], variant: str | None) -> None:
    """Refuse a variant that no part has: the plain weights would be taken in its place.

    Args:
        files: the names of the files of all parts.
        variant: the variant that is asked for, if any.

    Raises:
        UnfitFiles: there are weights, and none of that variant.
    """
    files = list(files)
    if variant is None or variant in (known := _variants(files)):
        return
    others = f"it has {', '.join(map(repr, known))}" if known else "it has plain weights only; leave variant out"
    raise UnfitFiles(f"has no weights of variant={variant!r}; {others}")


def _variants(files: Iterable[str]) -> list[str]:
    """The variants of which there are weights; the plain ones are not among them."""
    found = {match["variant"] for file in files if (match := _WEIGHTS.fullmatch(file))}
    return sorted(variant for variant in found if variant)


def _weights(files: Iterable[str], variant: str | None) -> list[str]:
    """The safetensors of a folder, and their index: of the variant where there are such, else the plain ones."""
    groups: dict[str | None, list[str]] = defaultdict(list)
    for file in files:
        if match := _WEIGHTS.fullmatch(file) or _INDEX.fullmatch(file):
            groups[match["variant"]].append(file)
        elif file.endswith(".safetensors"):
            groups["named otherwise"].append(file)
    return groups[variant] or groups[None] or groups["named otherwise"]


def _named_in_indexes(place: Path, files: Iterable[str]) -> set[str]:
    """The shards that the indexes among `files` name."""
    indexes = [place / file for file in files if _INDEX.fullmatch(file)]
    return {shard for path in indexes for shard in re.findall(r'"([^"]+\.safetensors)"', path.read_text("utf-8"))}
