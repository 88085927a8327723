"""Which files of a repository or folder are needed, and whether it has them; no network in here."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Final

_SMALL: Final = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TOKENIZERS: Final = ("tokenizer", "vocab", "merges", "spm", "spiece", "preprocessor", "processor")
_STEM: Final = r"(?:model|diffusion_pytorch_model)"
_SHARD: Final = r"(?:-\d+-of-\d+)?"
# `model.safetensors`, `model.fp16.safetensors`, and either one in shards, whose numbers come before or after `fp16`.
_WEIGHTS: Final = re.compile(rf"{_STEM}{_SHARD}(?:\.(?P<variant>\w+){_SHARD})?\.safetensors")
_INDEX: Final = re.compile(rf"{_STEM}\.safetensors\.index(?:\.(?P<variant>\w+))?\.json")
_ANOTHER: Final = "pass another id or local path, as save_pretrained of diffusers or transformers writes it"
PICKLE: Final = "pytorch_model.bin"  # which `needed_files` takes on request


class UnfitFiles(FileNotFoundError):
    """What is wrong with a repository or folder: the end of a sentence that begins with its name."""


def needed_files(
    names: Iterable[str],
    parts: Sequence[str] = (),
    *,
    optional: Sequence[str] = (),
    variant: str | None = None,
    weights: bool = True,
    pickled: bool = False,
) -> list[str]:
    """The files that are needed of those of a repository or folder: safetensors, configs and tokenizers.

    Args:
        names: all files; those of folders that are no parts are passed over.
        parts: sub-folders that are needed; empty for the files at the top.
        optional: sub-folders that are taken where they are.
        variant: such as `fp16`: a folder's weights of that kind, where it has such.
        weights: False for configs and tokenizers alone.
        pickled: take `pytorch_model.bin` where there are no safetensors; whoever reads it does so as tensors only.

    Raises:
        UnfitFiles: a part, weights of it, a shard or the tokenizer is missing, or no part has the variant.
    """
    folders: dict[str, list[str]] = defaultdict(list)
    for name in names:
        folder, _, file = name.rpartition("/")
        folders[folder].append(file)
    if missing := [part for part in parts if part not in folders]:
        raise UnfitFiles(f"lacks {', '.join(missing)}/; {_ANOTHER}")
    chosen = ["model_index.json"] if parts and "model_index.json" in folders[""] else []
    places = (*(parts or ("",)), *(each for each in optional if each in folders))
    if weights:
        _refuse_unknown_variant([file for place in places for file in folders[place]], variant)
    found = False
    for place in places:
        wanted = [file for file in folders[place] if file.endswith(_SMALL) and not _INDEX.fullmatch(file)]
        extra = (
            _weights(folders[place], f"{place}/" if place else "its top folder", variant, pickled) if weights else []
        )
        found = found or bool(extra) or (not weights and any(file.startswith(_TOKENIZERS) for file in wanted))
        chosen += [f"{place}/{file}" if place else file for file in (*wanted, *extra)]
    if not found:
        raise UnfitFiles(f"has no {'model.safetensors' if weights else 'tokenizer'}; {_ANOTHER}")
    return chosen


def named_files(wanted: Sequence[str], names: Iterable[str]) -> list[str]:
    """`wanted`, all of which must be among a repository's `names`.

    Raises:
        UnfitFiles: one is not.
    """
    if missing := sorted(set(wanted).difference(names)):
        raise UnfitFiles(f"has no {missing[0]}; pass another id or local path")
    return list(wanted)


def _weights(files: Sequence[str], where: str, variant: str | None, pickled: bool) -> list[str]:
    """The weights of a folder, and their index: of the variant where there are such, else the plain ones.

    Raises:
        UnfitFiles: they are incomplete; or, in a network's folder, pickles, of another variant, or missing.
    """
    groups: dict[str | None, list[str]] = defaultdict(list)
    for file in files:
        if match := _WEIGHTS.fullmatch(file) or _INDEX.fullmatch(file):
            groups[match["variant"]].append(file)
    if found := groups[variant] or groups[None]:
        _refuse_missing_shards(found, where)
        return found
    if pickled and PICKLE in files:
        return [PICKLE]
    if "config.json" not in files:
        return []
    if others := _variants(files):
        raise UnfitFiles(f"has weights in {where} of variant {others[0]!r} only; pass variant={others[0]!r}")
    if pickles := [file for file in files if file.endswith(_PICKLES)]:
        raise UnfitFiles(
            f"holds its weights in {where} as a pickle only ({pickles[0]}), which is not read, since it can run code; "
            "convert it where you trust it: from_pretrained(..., use_safetensors=False), save_pretrained('PATH'), and "
            "pass PATH; or pass a revision that has safetensors"
        )
    raise UnfitFiles(f"has no weights in {where}; {_ANOTHER}")


def _refuse_missing_shards(files: Sequence[str], where: str) -> None:
    """Refuse weights of which a shard or the index is missing, as after a download that broke off."""
    shards = [match.groups() for file in files if (match := re.search(r"-(\d+)-of-(\d+)", file))]
    if shards and (len(shards) < int(shards[0][1]) or not any(map(_INDEX.fullmatch, files))):
        raise UnfitFiles(f"has {len(shards)} of {int(shards[0][1])} shards in {where}, or not their index; {_ANOTHER}")


def _refuse_unknown_variant(files: Sequence[str], variant: str | None) -> None:
    """Refuse a variant that no part has: the plain weights would be taken in its place."""
    if variant is None or variant in (known := _variants(files)):
        return
    others = f"it has {', '.join(map(repr, known))}" if known else "it has plain weights only; leave variant out"
    raise UnfitFiles(f"has no weights of variant={variant!r}; {others}")


def _variants(files: Iterable[str]) -> list[str]:
    """The variants of which there are weights; the plain ones are not among them."""
    found = {match["variant"] for file in files if (match := _WEIGHTS.fullmatch(file))}
    return sorted(variant for variant in found if variant)
