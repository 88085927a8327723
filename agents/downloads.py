"""`diffusion-gym download`: fetches the files of models and rewards into the hub's cache, never a pickle unasked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import tyro
from pydantic import JsonValue

from diffusion_gym.envs.registration import PREFIX, environment_ids
from diffusion_gym.hub import MODEL_SOURCES, REWARD_SOURCES, repository_files
from diffusion_gym.hub_files import UnfitFiles, needed_files
from diffusion_gym.hub_sources import MAYBE_PICKLED, NAMED_FILES, TOKENIZER_ONLY, size_text
from diffusion_gym.models import MODELS
from diffusion_gym.registry import unknown_name
from diffusion_gym.rewards import REWARDS
from diffusion_gym.schemas import read_checked

_NOT_LOADED: Final = {"safety_checker", "feature_extractor", "image_encoder"}  # parts that no model of ours has

_PICKLE: Final = "pytorch_model.bin"
_SECONDS: Final = 10.0  # patience with the hub: here the user wants the network


@dataclass(frozen=True)
class DownloadOptions:
    """Fetch the files of a model, a reward or an environment into the hub's cache."""

    id: Annotated[str, tyro.conf.Positional]
    """A model's name (SD14), a reward's (Aesthetic), an environment id (both of them), or a hub id (owner/name)."""
    revision: str | None = None
    """Branch, tag or commit of the model."""
    variant: str | None = None
    """Such as fp16: the weight files of the model to take where there are several."""


@dataclass(frozen=True)
class Wanted:
    """A hub id to fetch from.

    Attributes:
        source: the hub id.
        revision: branch, tag or commit.
        variant: the weights' kind.
        weights: False where the tokenizer and the configs suffice.
    """

    source: str
    revision: str | None = None
    variant: str | None = None
    weights: bool = True


def wanted_sources(options: DownloadOptions) -> list[Wanted]:
    """What `options.id` stands for; empty where nothing is to be downloaded.

    Raises:
        ValueError: an unknown name, or a revision or variant of what is no model.
    """
    name = options.id
    ids = environment_ids()
    parts = ids.get(name) or ids.get(f"{name}-v0")
    model, reward = (parts["model"], parts["reward"]) if parts else (name, name)
    known = parts or name in MODELS or name in REWARDS
    if not known and name.count("/") != 1:
        names = list(ids) if name.startswith(PREFIX) else [*MODELS, *REWARDS]
        raise ValueError(unknown_name("id", name, names) + "; or give an environment id or a hub id (owner/name)")
    source = MODEL_SOURCES.get(model) if known else name
    if source is None and (options.revision or options.variant):
        raise ValueError(f"--revision and --variant are for a model from the hub; {name} has none, leave them out")
    wanted = [] if source is None else [Wanted(source, options.revision, options.variant)]
    return wanted + [Wanted(each, weights=each not in TOKENIZER_ONLY) for each in REWARD_SOURCES.get(reward, ())]


def run_download(options: DownloadOptions) -> None:
    """Say how much disk it takes, fetch, and say where it lies.

    Raises:
        FileNotFoundError: the hub cannot be reached, or has not what is needed.
    """
    wanted = wanted_sources(options)
    if not wanted:
        print(f"{options.id} needs no files from the hub")
    plans = [(each, _plan(each)) for each in wanted]
    for each, files in plans:
        size = sum(files.values())
        about = _size(size) if size else size_text(each.source, variant=each.variant, weights=each.weights)
        print(f"{each.source}: {len(files)} files, {about} on disk", flush=True)
    for each, files in plans:
        print(f"{each.source}: {_fetch(each, list(files))}", flush=True)


def _plan(wanted: Wanted) -> dict[str, int]:
    """The files to fetch, with their sizes in bytes.

    Raises:
        FileNotFoundError: the hub cannot be reached, or has not what is needed.
    """
    from huggingface_hub import constants

    try:
        there = repository_files(wanted.source, wanted.revision, sizes=True, seconds=_SECONDS)
        return {name: there[name] for name in _files(wanted, list(there))}
    except UnfitFiles as error:
        raise FileNotFoundError(f"id={wanted.source!r} {error}") from error
    except Exception as error:  # the hub's client raises many kinds
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        size = size_text(wanted.source, variant=wanted.variant, weights=wanted.weights)
        raise FileNotFoundError(
            f"id={wanted.source!r} ({size}) cannot be had from the hub ({reason}); download it where there is a "
            f"network, and copy the cache {constants.HF_HUB_CACHE} from there"
        ) from error


def _files(wanted: Wanted, names: Sequence[str]) -> Sequence[str]:
    """Those of a repository's files that are to be fetched."""
    if (named := NAMED_FILES.get(wanted.source)) is not None:
        if missing := sorted(set(named).difference(names)):
            raise UnfitFiles(f"lacks {missing[0]}")
        return named
    parts = _parts(wanted, names)
    try:
        return needed_files(names, parts, variant=wanted.variant, weights=wanted.weights)
    except UnfitFiles:
        if wanted.source not in MAYBE_PICKLED or _PICKLE not in names:
            raise
        return [*needed_files(names, parts, weights=False), _PICKLE]


def _parts(wanted: Wanted, names: Sequence[str]) -> list[str]:
    """The sub-folders of a pipeline that are loaded; none for what is no pipeline, or lies flat at the top."""
    if "model_index.json" not in names:
        return []
    path = _fetch(wanted, ["model_index.json"]) / "model_index.json"
    index = read_checked(dict[str, JsonValue], path, f"take another --revision of {wanted.source}")
    lists = {key: value for key, value in index.items() if isinstance(value, list) and key not in _NOT_LOADED}
    parts = [key for key, value in lists.items() if value and value[0]]
    return [part for part in parts if any(name.startswith(f"{part}/") for name in names)]


def _fetch(wanted: Wanted, files: list[str]) -> Path:
    """Fetch files; gives the folder of the cache that holds them.

    Raises:
        OSError: the connection broke, or the disk is full.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(wanted.source, revision=wanted.revision, allow_patterns=files))
    except Exception as error:  # the hub's client raises many kinds
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise OSError(f"id={wanted.source!r} broke off ({reason}); the same command goes on from there") from error


def _size(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"
