"""`diffusion-gym download`: fetches the files of models and rewards into the hub's cache, never a pickle unasked."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Final

import tyro
from pydantic import JsonValue

from diffusion_gym.envs.registration import PREFIX, environment_ids
from diffusion_gym.hub import MODEL_SOURCES, REWARD_SOURCES, Repository
from diffusion_gym.hub_files import named_files, needed_files
from diffusion_gym.hub_sources import MAYBE_PICKLED, NAMED_FILES, TOKENIZER_ONLY
from diffusion_gym.models import MODELS
from diffusion_gym.registry import unknown_name
from diffusion_gym.rewards import REWARDS
from diffusion_gym.schemas import read_checked

_NOT_LOADED: Final = {"safety_checker", "feature_extractor", "image_encoder"}  # parts that no model of ours has


@dataclass(frozen=True)
class DownloadOptions:
    """Fetch the files of a model, a reward or an environment into the hub's cache."""

    id: Annotated[str, tyro.conf.Positional]
    """A model's name (SD14), a reward's (Aesthetic), an environment id (both of them), or a hub id (owner/name)."""
    revision: str | None = None
    """Branch, tag or commit of the model."""
    variant: str | None = None
    """Such as fp16: the weight files of the model to take where there are several."""


def wanted_sources(options: DownloadOptions) -> list[Repository]:
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
    wanted = [] if source is None else [Repository(source, revision=options.revision, variant=options.variant)]
    return wanted + [Repository(each) for each in REWARD_SOURCES.get(reward, ())]


def run_download(options: DownloadOptions) -> None:
    """Say how much disk it takes, fetch, and say where it lies.

    Raises:
        FileNotFoundError: the hub cannot be reached, or has not what is needed.
    """
    wanted = wanted_sources(options)
    if not wanted:
        print(f"{options.id} needs no files from the hub")
    # Of what is asked for by its hub id all is taken.
    plans = [(each, each.chosen(partial(_files, each, each.source == options.id))) for each in wanted]
    for each, files in plans:
        size = sum(files.values())
        about = f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
        print(f"{each.source}: {len(files)} files, {about} on disk", flush=True)
    for each, files in plans:
        print(f"{each.source}: {each.fetch(files)}", flush=True)


def _files(wanted: Repository, whole: bool, names: Collection[str]) -> Sequence[str]:
    """Those of a repository's files that are to be fetched."""
    if named := NAMED_FILES.get(wanted.source):
        return named_files(named, names)
    weights, pickled = whole or wanted.source not in TOKENIZER_ONLY, wanted.source in MAYBE_PICKLED
    return needed_files(names, _parts(wanted, names), variant=wanted.variant, weights=weights, pickled=pickled)


def _parts(wanted: Repository, names: Collection[str]) -> list[str]:
    """The sub-folders of a pipeline that are loaded; none for what is no pipeline, or lies flat at the top."""
    if "model_index.json" not in names:
        return []
    path = Path(wanted.fetch(["model_index.json"])) / "model_index.json"
    index = read_checked(dict[str, JsonValue], path, f"take another --revision of {wanted.source}")
    lists = {key: value for key, value in index.items() if isinstance(value, list) and key not in _NOT_LOADED}
    parts = [key for key, value in lists.items() if value and value[0]]
    return [part for part in parts if any(name.startswith(f"{part}/") for name in names)]
