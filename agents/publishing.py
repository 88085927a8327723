"""`diffusion-gym push`: what a run learned, with its card, to the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from diffusion_gym.agents.training.card import write_card
from diffusion_gym.hub import Repository
from diffusion_gym.storage import is_unfinished


@dataclass(frozen=True)
class PushOptions:
    """Upload a run's `model/`, weights and card, to a repository of the hub; nothing else of the run."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder."""
    hub_id: Annotated[str, tyro.conf.Positional]
    """The repository, owner/name; it is made where there is none."""
    private: bool = False
    """Make a new repository private; one that is there stays as it is."""
    dry_run: bool = False
    """Write the card and say what would be uploaded; nothing leaves this machine."""


def run_push(options: PushOptions) -> None:
    """Write the card, say what is uploaded, and upload it.

    Raises:
        FileNotFoundError: the run has exported nothing, or the id is none.
        ValueError: something in `model/` is no file, or leads elsewhere.
        OSError: the hub refused, or cannot be reached.
    """
    repository = Repository(options.hub_id, "hub_id")
    write_card(options.run, options.hub_id)
    folder = options.run / "model"
    files = uploads(folder)
    size = sum((folder / name).stat().st_size for name in files)
    verb = "would upload" if options.dry_run else "uploads"
    print(f"{verb} {len(files)} files, {size / 1e6:.1f} MB, to {options.hub_id}:", flush=True)
    for name in files:
        print(f"  {name}  {(folder / name).stat().st_size:,} bytes")
    if not options.dry_run:
        print(_upload(repository.source, folder, files, options.private))


def uploads(folder: Path) -> list[str]:
    """The files of an exported model, relative to its folder.

    Raises:
        ValueError: a link, which may lead anywhere.
    """
    names = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise ValueError(f"{path} is a link, which may lead anywhere; put the file itself there, or remove it")
        if path.is_file() and not is_unfinished(path):
            names.append(path.relative_to(folder).as_posix())
    return names


def _upload(hub_id: str, folder: Path, files: list[str], private: bool) -> str:
    """Upload in one commit; returns its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(hub_id, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=hub_id, folder_path=folder, allow_patterns=files, commit_message="Upload from diffusion_gym"
        )
    except Exception as error:  # many kinds, of the hub's client and of the HTTP library that its version uses
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise OSError(
            f"hub_id={hub_id!r}: the hub did not take it ({reason}); log in with `hf auth login`, or set HF_TOKEN to a "
            "token that may write there, and run the same command again: nothing here has changed"
        ) from error
    return str(done)
