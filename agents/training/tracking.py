"""Where the numbers and pictures of a training are shown while it runs: TensorBoard, and W&B where it is asked for."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from diffusion_gym.agents.training.run_files import read_config
from diffusion_gym.schemas import Schema, read_checked
from diffusion_gym.storage import write_json

Track = Literal["tensorboard", "wandb", "none"]
Picture = npt.NDArray[np.uint8]

_COUNTERS: Final = frozenset({"iteration", "reward_queries"})


class Tracker:
    """Shows a training by accelerate's trackers; a context manager that closes them.

    Args:
        trackers: started trackers of accelerate; none for a process that shows nothing.
    """

    def __init__(self, trackers: Sequence[Any] = ()) -> None:
        self._trackers = trackers

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for tracker in self._trackers:
            if kind is not None and tracker.name == "wandb":
                tracker.tracker.finish(exit_code=1)  # accelerate's own `finish` always tells of success
            else:
                tracker.finish()

    def scalars(self, record: Mapping[str, Any], queries: int, prefix: str = "") -> None:
        """Show the finite numbers of a record, each as `prefix` and its name; its counters are the x axis."""
        numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}
        shown = {prefix + k: v for k, v in numbers.items() if k not in _COUNTERS and math.isfinite(v)}
        for tracker in self._trackers:
            tracker.log(shown, step=queries)

    def picture(self, name: str, pixels: Picture, queries: int) -> None:
        """Show a picture, uint8 `(H, W, 3)`."""
        for tracker in self._trackers:
            tracker.log_images({name: pixels[None]}, step=queries)

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], queries: int) -> None:
        """Show rows of numbers, text and pictures where there are tables; they are made only for who reads them."""
        for tracker in self._trackers:
            if tracker.name == "wandb":
                image = _wandb().Image
                data = [[image(cell) if isinstance(cell, np.ndarray) else cell for cell in row] for row in rows]
                tracker.log_table(name, columns=list(columns), data=data, step=queries)


def _tensorboard(folder: Path, queries: int) -> Any:
    """TensorBoard's event files; it hides what an interrupted run wrote after `queries`."""
    from accelerate.tracking import TensorBoardTracker

    class TensorBoard(TensorBoardTracker):  # type: ignore[misc]
        def log_images(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
            super().log_images(values, step=step, dataformats="NHWC", **options)

    return TensorBoard("tensorboard", folder, purge_step=queries + 1)


def _weights_and_biases(folder: Path) -> Any:
    """W&B; a resumed run goes on in the same W&B run, whose id `wandb.json` holds.

    W&B's own environment variables choose the rest, such as WANDB_PROJECT and WANDB_MODE=offline.
    """
    from accelerate.tracking import WandBTracker

    class WeightsAndBiases(WandBTracker):  # type: ignore[misc]
        def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
            # A resumed run repeats steps, which W&B would drop from its own counter.
            super().log({**values, "reward_queries": step}, **options)

    return WeightsAndBiases(
        os.environ.get("WANDB_PROJECT", "diffusion-gym"),
        name=os.environ.get("WANDB_NAME", folder.resolve().name),
        id=_run_id(folder),
        resume="allow",
        dir=str(folder),
        config=read_config(folder).model_dump() if (folder / "config.json").is_file() else {},
        settings=_wandb().Settings(console="off"),  # the progress bar would fill its log
    )


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
    """The trackers of a run.

    Args:
        track: `tensorboard`; `wandb`, which is both; or `none`.
        folder: the run folder.
        queries: the reward queries after which the run goes on.

    Raises:
        ValueError: wandb is asked for and not installed, or has no account.
    """
    from accelerate import PartialState

    check_track(track)
    if track == "none":
        return Tracker()
    PartialState()  # without which its trackers raise; the one of before where there are several processes
    trackers = []
    if track == "wandb":
        trackers.append(_weights_and_biases(folder))
        try:
            trackers[0].start()
        except _wandb().errors.Error as error:
            raise ValueError(
                f"track='wandb' failed ({' '.join(str(error).split())}); run `wandb login`, set WANDB_MODE=offline, or "
                "use --track tensorboard"
            ) from error
        trackers[0].tracker.define_metric("*", step_metric="reward_queries")
    trackers.append(_tensorboard(folder, queries))
    trackers[-1].start()
    return Tracker(trackers)


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
