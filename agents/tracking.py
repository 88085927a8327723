"""Where the numbers and pictures of a training are shown while it runs: TensorBoard, and W&B where it is asked for."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Final, Literal, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import Field

from diffusion_gym.agents.run_files import read_config
from diffusion_gym.schemas import Schema, read_checked
from diffusion_gym.storage import write_json

Track = Literal["tensorboard", "wandb", "none"]
Picture = npt.NDArray[np.uint8]

_COUNTERS: Final = frozenset({"iteration", "reward_queries"})


class Writer(Protocol):
    """What can show a training; `queries` are the reward queries so far, the x axis."""

    def scalars(self, values: Mapping[str, float], queries: int) -> None:
        """Show finite numbers by name."""

    def picture(self, name: str, pixels: Picture, queries: int) -> None:
        """Show a picture, uint8 `(H, W, 3)`."""

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], queries: int) -> None:
        """Show rows of numbers, text and pictures; they are made only for who reads them."""

    def close(self, *, failed: bool) -> None:
        """Finish writing."""


class Tracker:
    """Passes everything to a number of writers; a context manager that closes them.

    Args:
        writers: the writers; none for a process that shows nothing.
    """

    def __init__(self, writers: Sequence[Writer] = ()) -> None:
        self.writers = writers

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self.writers:
            writer.close(failed=kind is not None)

    def scalars(self, record: Mapping[str, Any], queries: int, prefix: str = "") -> None:
        """Show the finite numbers of a record, each as `prefix` and its name; its counters are the x axis."""
        numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}
        shown = {prefix + k: v for k, v in numbers.items() if k not in _COUNTERS and math.isfinite(v)}
        for writer in self.writers:
            writer.scalars(shown, queries)

    def picture(self, name: str, pixels: Picture, queries: int) -> None:
        """Show a picture, uint8 `(H, W, 3)`."""
        for writer in self.writers:
            writer.picture(name, pixels, queries)

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], queries: int) -> None:
        """Show a table to the writers that have such."""
        for writer in self.writers:
            writer.table(name, columns, rows, queries)


class TensorBoard:
    """Writes TensorBoard's event files.

    Args:
        folder: of the files.
        queries: where the run goes on; TensorBoard hides what an interrupted run wrote after it.
    """

    def __init__(self, folder: Path, queries: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board: Any = SummaryWriter(str(folder), purge_step=queries + 1)

    def scalars(self, values: Mapping[str, float], queries: int) -> None:
        """Write each as a scalar."""
        for name, value in values.items():
            self._board.add_scalar(name, value, queries)

    def picture(self, name: str, pixels: Picture, queries: int) -> None:
        """Write an image."""
        self._board.add_image(name, pixels, queries, dataformats="HWC")

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], queries: int) -> None:
        """Nothing: TensorBoard has no tables of pictures."""

    def close(self, *, failed: bool) -> None:
        """Write what is left."""
        self._board.close()


class WandB:
    """Writes to Weights & Biases; a resumed run goes on in the same W&B run, whose id `wandb.json` holds.

    W&B's own environment variables choose the rest, such as WANDB_PROJECT and WANDB_MODE=offline.

    Args:
        folder: the run folder; its `config.json`, if there, becomes the configuration shown.

    Raises:
        ValueError: wandb is not installed, or has no account to write to.
    """

    def __init__(self, folder: Path) -> None:
        self._wandb = _wandb()
        try:
            self._run: Any = self._wandb.init(
                project=os.environ.get("WANDB_PROJECT", "diffusion-gym"),
                name=os.environ.get("WANDB_NAME", folder.resolve().name),
                id=_run_id(folder),
                resume="allow",
                dir=str(folder),
                config=read_config(folder).model_dump() if (folder / "config.json").is_file() else {},
                settings=self._wandb.Settings(console="off"),  # the progress bar would fill its log
            )
        except self._wandb.errors.Error as error:
            raise ValueError(
                f"track='wandb' failed ({' '.join(str(error).split())}); run `wandb login`, set WANDB_MODE=offline, or "
                "use --track tensorboard"
            ) from error
        self._run.define_metric("*", step_metric="reward_queries")

    def scalars(self, values: Mapping[str, float], queries: int) -> None:
        """Log the numbers."""
        self._log(dict(values), queries)

    def picture(self, name: str, pixels: Picture, queries: int) -> None:
        """Log an image."""
        self._log({name: self._wandb.Image(pixels)}, queries)

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], queries: int) -> None:
        """Log a table; arrays in it are pictures."""
        data = [[self._wandb.Image(cell) if isinstance(cell, np.ndarray) else cell for cell in row] for row in rows]
        self._log({name: self._wandb.Table(columns=list(columns), data=data)}, queries)

    def close(self, *, failed: bool) -> None:
        """Finish the W&B run."""
        self._run.finish(exit_code=int(failed))

    def _log(self, values: dict[str, Any], queries: int) -> None:
        self._run.log({**values, "reward_queries": queries})


def check_track(track: str) -> None:
    """Refuse what cannot be written.

    Raises:
        ValueError: an unknown value, or wandb is asked for and not installed.
    """
    if track not in ("tensorboard", "wandb", "none"):
        raise ValueError(f"track={track!r} must be one of 'tensorboard', 'wandb', 'none'")
    if track == "wandb":
        _wandb()


def open_tracker(track: Track, folder: Path, queries: int) -> Tracker:
    """The writers of a run.

    Args:
        track: `tensorboard`; `wandb`, which is both; or `none`.
        folder: the run folder.
        queries: the reward queries after which the run goes on.

    Raises:
        ValueError: wandb is asked for and not installed, or has no account.
    """
    check_track(track)
    writers: list[Writer] = []
    if track == "wandb":
        writers.append(WandB(folder))
    if track != "none":
        writers.append(TensorBoard(folder / "tensorboard", queries))
    return Tracker(writers)


def _wandb() -> Any:
    try:
        wandb = import_module("wandb")
    except ImportError:
        wandb = None
    if not hasattr(wandb, "init"):  # a folder `wandb` of earlier runs can also be imported, as an empty package
        raise ValueError("track='wandb' needs the package wandb; pip install wandb, or use --track tensorboard")
    return wandb


class _Id(Schema):
    """`wandb.json`."""

    id: Annotated[str, Field(min_length=1)]


def _run_id(folder: Path) -> str:
    path = folder / "wandb.json"
    if not path.is_file():
        write_json(path, {"id": os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)})
    return read_checked(_Id, path, "write the id of the W&B run, or remove the file for a new one").id
