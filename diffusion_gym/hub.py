"""Finds the files of models and rewards: a local path, the hub's cache, or the hub itself; never a long wait."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from diffusion_gym.hub_files import UnfitFiles, lacks, needed_files, refuse_other_weights, refuse_unknown_variant
from diffusion_gym.hub_sources import MODEL_SOURCES, REWARD_SOURCES, size_text

_HUB_SECONDS: Final = 1.5  # patience with a hub that may not be there


def located(
    source: str,
    parts: Sequence[str] = (),
    *,
    argument: str = "model",
    revision: str | None = None,
    variant: str | None = None,
    optional: Sequence[str] = (),
    weights: bool = True,
) -> str:
    """The local directory that holds `source`, fetched from the hub if it is not in the cache.

    Only safetensors, configs and tokenizers are fetched, never pickles.

    Args:
        source: a directory, or a hub id such as `CompVis/stable-diffusion-v1-4`.
        parts: the sub-folders that must be there; empty where the files at the top suffice.
        argument: what the user calls `source`, for errors, such as `reward_kwargs['clip']`.
        revision: branch, tag or commit of a hub id; its main branch by default.
        variant: such as `fp16`: the weights of that kind, where a part has such.
        optional: sub-folders to take where the repository has them; in the cache there are all of them or none.
        weights: False where the tokenizer and the configs suffice.

    Raises:
        FileNotFoundError: the directory lacks a part; its weights are pickles; no part has the variant; or the id is
            not cached and the hub cannot be reached.
    """
    if Path(source).is_dir():
        found = [part for part in optional if Path(source, part).is_dir()]
        _check_directory(source, [*parts, *found], argument, variant)
        return source
    wanted = _Wanted(source, argument, revision, variant, weights, parts)
    folder = _cached(source, revision)
    if folder is not None:
        there = optional if any((folder / part).is_dir() for part in optional) else ()
        if not lacks(folder, [*parts, *there], variant=variant, weights=weights):
            return str(folder)

    def fetch(names: Sequence[str]) -> str:
        from huggingface_hub import snapshot_download

        files = needed_files(names, parts, optional=optional, variant=variant, weights=weights)
        return snapshot_download(source, revision=revision, allow_patterns=files)

    return wanted.fetched(fetch)


def located_file(source: str, filename: str, *, argument: str, revision: str | None = None) -> str:
    """The local path of one file, of any kind: whoever reads a pickle does so with `weights_only=True`.

    Args:
        source: the file itself, a directory that holds `filename`, or a hub id.
        filename: its name in the directory or repository.
        argument: what the user calls `source`, for errors.
        revision: branch, tag or commit of a hub id.

    Raises:
        FileNotFoundError: the directory lacks it; or it is not cached and the hub cannot be reached.
    """
    path = Path(source)
    if path.is_file():
        return source
    if path.is_dir():
        if not (path / filename).is_file():
            raise FileNotFoundError(f"{argument}={source!r} lacks {filename}; pass a directory that holds it")
        return str(path / filename)
    pipeline = filename == "model_index.json"  # whoever reads it will want the rest too
    wanted = _Wanted(
        source,
        argument,
        revision,
        files="a pipeline's folders" if pipeline else filename,
        kind="directory" if pipeline else "file or directory",
    )
    folder = _cached(source, revision)
    if folder is not None and (folder / filename).is_file():
        return str(folder / filename)

    def fetch(names: Sequence[str]) -> str:
        from huggingface_hub import hf_hub_download

        if filename not in names:
            raise UnfitFiles(f"has no {filename}; pass another id or a local path")
        return hf_hub_download(source, filename, revision=revision)

    return wanted.fetched(fetch)


def repository_files(
    source: str, revision: str | None = None, *, sizes: bool = False, seconds: float = _HUB_SECONDS
) -> dict[str, int]:
    """The files of a hub id; asks the hub.

    Args:
        source: the hub id.
        revision: branch, tag or commit.
        sizes: ask for their sizes too, which takes longer.
        seconds: patience with the hub.

    Returns:
        Sizes in bytes by name; 0 where not asked for, or not known.

    Raises:
        Exception: what the hub's client raises, or `TimeoutError` after `seconds`.
    """
    from huggingface_hub import HfApi

    def ask() -> Any:
        return HfApi().model_info(source, revision=revision, timeout=seconds, files_metadata=sizes)

    return {entry.rfilename: entry.size or 0 for entry in _within(seconds, ask).siblings or ()}


@dataclass(frozen=True)
class _Wanted:
    """Files of a hub id that are not in the cache: how they are fetched, and what is said where they cannot be.

    Raises:
        FileNotFoundError: `source` is no hub id.
    """

    source: str
    argument: str
    revision: str | None = None
    variant: str | None = None
    weights: bool = True
    parts: Sequence[str] = ()
    files: str = ""
    kind: str = "directory"

    def __post_init__(self) -> None:
        if self.source.startswith((".", "/", "~")) or self.source.count("/") != 1:
            raise FileNotFoundError(
                f"{self.argument}={self.source!r} is no {self.kind} here and no hub id of the form 'owner/name'; pass "
                "one of these"
            )

    def fetched(self, fetch: Callable[[Sequence[str]], str]) -> str:
        """What `fetch` gives, which is told the names of the repository's files.

        Raises:
            FileNotFoundError: the hub cannot be reached, or has not what is wanted.
        """
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            raise FileNotFoundError(self._refusal("HF_HUB_OFFLINE is set"))
        try:
            names = list(repository_files(self.source, self.revision))
        except Exception as error:  # the hub's client raises many kinds; each means: not to be had now
            raise FileNotFoundError(self._refusal(_first_line(error))) from error
        try:
            return fetch(names)
        except UnfitFiles as error:
            raise FileNotFoundError(f"{self.argument}={self.source!r} {error}") from error
        except Exception as error:
            raise FileNotFoundError(self._refusal(_first_line(error))) from error

    def _refusal(self, reason: str) -> str:
        whole = "its safetensors and configs" if self.weights else "its tokenizer and configs"
        files = self.files or ", ".join(f"{part}/" for part in self.parts) or whole
        chosen = {"revision": self.revision, "variant": self.variant}
        options = "".join(f" --{name} {value}" for name, value in chosen.items() if value)
        name, others = self.source, ""
        if not options and (rewards := [key for key, ids in REWARD_SOURCES.items() if self.source in ids]):
            also = f"or {', '.join(rewards[1:])}: " if rewards[1:] else ""
            name, others = rewards[0], f" ({also}all of that reward's weights)"
        size = size_text(self.source, variant=self.variant, weights=self.weights)
        return (
            f"{self.argument}={self.source!r} is not in the local cache and the hub gave nothing ({reason}); it needs "
            f"{files} ({size}): fetch them where there is a network with `diffusion-gym download {name}"
            f"{options}`{others}, or pass a local path as {self.argument}='PATH'"
        )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def _check_directory(source: str, parts: Sequence[str], argument: str, variant: str | None) -> None:
    try:
        if missing := [part for part in parts if not Path(source, part).is_dir()]:
            raise UnfitFiles(f"lacks {', '.join(missing)}/; pass a directory that diffusers' save_pretrained wrote")
        files = {part: [path.name for path in Path(source, part).iterdir()] for part in parts or ("",)}
        for part, names in files.items():
            refuse_other_weights(names, part, variant)
        refuse_unknown_variant((name for names in files.values() for name in names), variant)
    except UnfitFiles as error:
        raise FileNotFoundError(f"{argument}={source!r} {error}") from error


def _cached(source: str, revision: str | None) -> Path | None:
    """The folder of a hub id in the cache, be it complete or not."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        # No file is asked for, so none can be missing: what must be there is for `lacks` to say.
        return Path(snapshot_download(source, revision=revision, local_files_only=True, allow_patterns=[]))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _within(seconds: float, ask: Callable[[], Any]) -> Any:
    """What `ask` gives, or raises, in at most `seconds`: a name server that is away keeps its caller waiting."""
    answer: list[Any] = []
    failure: list[Exception] = []

    def run() -> None:
        try:
            answer.append(ask())
        except Exception as error:
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failure:
        raise failure[0]
    if not answer:
        raise TimeoutError(f"no answer within {seconds} seconds")
    return answer[0]


__all__ = ["MODEL_SOURCES", "REWARD_SOURCES", "located", "located_file", "repository_files"]
