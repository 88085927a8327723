"""Finds the files of models and rewards: a local path, the hub's cache, or the hub itself.

huggingface_hub does the work, and what is in its cache needs no network. It is asked for a repository's list of files
first, since that call alone keeps its time limit: without a network `hf_hub_download`, and `snapshot_download` of a
commit, retry for 24 s, and for a hub that takes a connection and never answers `snapshot_download` waits for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from diffusion_gym.hub_files import UnfitFiles, named_files, needed_files
from diffusion_gym.hub_sources import MODEL_SOURCES, REWARD_SOURCES, size_text


def located(
    source: str,
    parts: Sequence[str] = (),
    *,
    argument: str = "model",
    revision: str | None = None,
    variant: str | None = None,
    optional: Sequence[str] = (),
    weights: bool = True,
    pickled: bool = False,
) -> str:
    """The local directory that holds `source`, fetched from the hub if it is not in the cache.

    Only safetensors, configs and tokenizers are fetched, never pickles unasked.

    Args:
        source: a directory, or a hub id such as `CompVis/stable-diffusion-v1-4`.
        parts: the sub-folders that must be there; empty where the files at the top suffice.
        argument: what the user calls `source`, for errors, such as `reward_kwargs['clip']`.
        revision: branch, tag or commit of a hub id; its main branch by default.
        variant: such as `fp16`: the weights of that kind, where a part has such.
        optional: sub-folders to take where the repository has them; in the cache there are all of them or none.
        weights: False where the tokenizer and the configs suffice.
        pickled: take `pytorch_model.bin` where there are no safetensors.

    Raises:
        FileNotFoundError: the directory lacks a part; its weights are pickles; no part has the variant; or the id is
            not cached and cannot be fetched.
    """
    needed = partial(needed_files, variant=variant, weights=weights, pickled=pickled)
    if Path(source).is_dir():
        with _fit(source, argument):
            needed(_names(source, (*parts, *optional)), parts, optional=optional)
        return source
    repository = Repository(source, argument, revision, variant)
    if (folder := repository.cached()) is not None:
        names = _names(folder, (*parts, *optional))
        there = optional if any("/" in name for name in names) else ()
        try:
            needed(names, [*parts, *there])
            return str(folder)
        except UnfitFiles:
            pass  # of a download that broke off, or for another variant: the hub may have more
    return repository.fetch(repository.chosen(lambda names: needed(names, parts, optional=optional)))


def located_file(source: str, filename: str, *, argument: str, revision: str | None = None) -> str:
    """The local path of one file, of any kind: whoever reads a pickle does so with `weights_only=True`.

    Args:
        source: the file itself, a directory that holds `filename`, or a hub id.
        filename: its name in the directory or repository.
        argument: what the user calls `source`, for errors.
        revision: branch, tag or commit of a hub id.

    Raises:
        FileNotFoundError: the directory lacks it; or it is not cached and cannot be fetched.
    """
    path = Path(source)
    if path.is_file():
        return source
    if path.is_dir():
        if not (path / filename).is_file():
            raise FileNotFoundError(f"{argument}={source!r} lacks {filename}; pass a directory that holds it")
        return str(path / filename)
    repository = Repository(source, argument, revision)
    folder = repository.cached()
    if folder is None or not (folder / filename).is_file():
        folder = Path(repository.fetch(repository.chosen(lambda names: named_files([filename], names))))
    return str(folder / filename)


@dataclass(frozen=True)
class Repository:
    """A hub id.

    Attributes:
        source: the id.
        argument: what the user calls it, for errors; `id` is that of the command `download`.
        revision: branch, tag or commit.
        variant: of the weights.

    Raises:
        FileNotFoundError: `source` is no hub id.
    """

    source: str
    argument: str = "id"
    revision: str | None = None
    variant: str | None = None

    def __post_init__(self) -> None:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        told = (
            f"{self.argument}={self.source!r} is no path here and no hub id of the form 'owner/name'; pass one of these"
        )
        if "/" not in self.source:
            raise FileNotFoundError(told)
        try:
            validate_repo_id(self.source)
        except HFValidationError as error:
            raise FileNotFoundError(told) from error

    def cached(self) -> Path | None:
        """Its folder in the cache, be it complete or not."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            # No file is asked for, so none can be missing: what must be there is for `needed_files` to say.
            folder = snapshot_download(self.source, revision=self.revision, local_files_only=True, allow_patterns=[])
        except LocalEntryNotFoundError:
            return None
        return Path(folder)

    def chosen(self, choose: Callable[[Collection[str]], Sequence[str]]) -> dict[str, int]:
        """Those of its files, as the hub lists them, that `choose` takes, with their sizes in bytes.

        Raises:
            FileNotFoundError: they are unfit; or the hub does not have it, does not give it, or is not there.
        """
        from huggingface_hub import HfApi, constants

        with self._told():
            found = HfApi().model_info(
                self.source, revision=self.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT, files_metadata=True
            )
            sizes = {entry.rfilename: entry.size or 0 for entry in found.siblings or ()}
        with _fit(self.source, self.argument):
            return {name: sizes[name] for name in choose(sizes)}

    def fetch(self, files: Iterable[str]) -> str:
        """Its folder in the cache, with these of its files.

        Raises:
            FileNotFoundError: the hub does not give them.
        """
        from huggingface_hub import snapshot_download

        with self._told():
            return snapshot_download(self.source, revision=self.revision, allow_patterns=list(files))

    @contextmanager
    def _told(self) -> Iterator[None]:
        """The one place that puts what the hub's client raises into our words."""
        from huggingface_hub import constants, errors

        page = f"{constants.ENDPOINT}/{self.source}"
        try:
            yield
        except Exception as error:  # many kinds, of two libraries
            match error:
                case errors.GatedRepoError():
                    told = f"is gated: accept its terms at {page}, and log in with `hf auth login`"
                case errors.RepositoryNotFoundError():
                    told = f"is not at {page}, or is private: check the name, or log in with `hf auth login`"
                case errors.RevisionNotFoundError():
                    told = f"has no revision={self.revision!r}; pass a branch, tag or commit that {page} has"
                case _:
                    reason = f"{type(error).__name__}: {error}".splitlines()[0]
                    told = f"is not in the local cache and the hub gave nothing ({reason}); {self._remedy()}"
            raise FileNotFoundError(f"{self.argument}={self.source!r} {told}") from error

    def _remedy(self) -> str:
        from huggingface_hub import constants

        size = size_text(self.source, self.variant)
        if self.argument == "id":
            cache = constants.HF_HUB_CACHE
            return f"where there is a network the same command goes on ({size}); copy the cache {cache} from there"
        chosen = {"revision": self.revision, "variant": self.variant}
        name, others = self.source + "".join(f" --{key} {value}" for key, value in chosen.items() if value), ""
        if rewards := [key for key, ids in REWARD_SOURCES.items() if name in ids]:
            also = f"or {', '.join(rewards[1:])}: " if rewards[1:] else ""
            name, others = rewards[0], f" ({also}all of that reward's weights)"
        return (
            f"fetch it ({size}) where there is a network with `diffusion-gym download {name}`{others}, or pass a local "
            f"path as {self.argument}='PATH'"
        )


@contextmanager
def _fit(source: str, argument: str) -> Iterator[None]:
    try:
        yield
    except UnfitFiles as error:
        raise FileNotFoundError(f"{argument}={source!r} {error}") from error


def _names(folder: str | Path, parts: Sequence[str]) -> list[str]:
    """The files at the top and in sub-folders of a directory, as a repository would list them."""
    found = [path.name for path in Path(folder).iterdir() if not path.is_dir()]
    for part in parts:
        if (place := Path(folder, part)).is_dir():
            found += [f"{part}/", *(f"{part}/{path.name}" for path in place.iterdir())]
    return found


__all__ = ["MODEL_SOURCES", "REWARD_SOURCES", "Repository", "located", "located_file"]
