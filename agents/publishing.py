"""`diffusion-gym push`: what a run learned, with its card, to the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
        ValueError: something in `model/` leads elsewhere; or a private upload is asked for to a public repository.
        OSError: the hub refused or ignored a file, or cannot be reached.
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
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    api = HfApi()
    with _told(hub_id):
        try:
            there = api.model_info(hub_id)
        except RepositoryNotFoundError:
            there = None
    if there is not None and private and not there.private:
        raise ValueError(
            f"private=True, but hub_id={hub_id!r} is there and public; make it private in its settings, or leave "
            "--private out: nothing was uploaded"
        )
    if there is not None:
        print(f"{hub_id} is there: files of these names are replaced, its others stay", flush=True)
    with _told(hub_id):
        if there is None:  # private=None leaves an organisation its own default
            api.create_repo(hub_id, private=private or None, exist_ok=True)
        # Not `upload_folder`: it takes patterns, so that a name with brackets is left out, and may commit in parts.
        added = [CommitOperationAdd(name, folder / name) for name in files]
        done = api.create_commit(hub_id, added, commit_message="Upload from diffusion_gym")
        arrived = {entry.rfilename for entry in api.model_info(hub_id, revision=done.oid).siblings or ()}
    if missing := [name for name in files if name not in arrived]:
        raise OSError(
            f"hub_id={hub_id!r}: the hub ignored {', '.join(missing)}; remove what names it from the .gitignore there, "
            "and run the same command again"
        )
    return str(done.commit_url)


@contextmanager
def _told(hub_id: str) -> Iterator[None]:
    """Put what the hub's client raises into one sentence."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except Exception as error:  # many kinds, of the hub's client and of the HTTP library that its version uses
        kind, said, status = type(error).__name__, str(error), None
        if isinstance(error, HfHubHTTPError):
            status = error.response.status_code
            kind, said = str(status), error.server_message or said
        remedy = "run the same command again"
        if status in (401, 403, 404):
            remedy = f"log in with `hf auth login`, or set HF_TOKEN to a token that may write there, and {remedy}"
        reason = f"{kind}: {' '.join(said.split())}"
        raise OSError(
            f"hub_id={hub_id!r}: the hub did not take it ({reason}); {remedy}: nothing here has changed"
        ) from error
