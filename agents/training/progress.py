"""How far a training is, on one line: a bar where a terminal is, else a line a minute, so that a log stays short."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Final, TextIO

from tqdm import tqdm

from diffusion_gym.agents.algorithms import AgentConfig

_EVERY: Final = 60.0  # seconds between two lines of a log
# A backward pass takes about twice the time of the forward pass before it.
_WITH_GRADIENT: Final = 3.0
_BAR: Final = "{l_bar}{bar}| {n_fmt}/{total_fmt} images [{elapsed}<{remaining}{postfix}]"


class ProgressLine:
    """Shows reward, images/s and the time left; a context manager.

    Args:
        total: the pictures of the run.
        done: those that it has behind it.
        shown: whether anything is.
        stream: where to; by default stderr.
    """

    def __init__(self, total: int, done: int, *, shown: bool = True, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._total, self._done, self._first, self._shown = total, done, done, shown
        self._bar: Any = None
        if shown and self._stream.isatty():
            options: dict[str, Any] = {"unit": "image", "dynamic_ncols": True, "bar_format": _BAR}
            self._bar = tqdm(total=total, initial=done, file=self._stream, **options)
        self._seconds = 0.0
        self._started = time.monotonic()
        self._said = self._started - _EVERY  # the first iteration tells how long the others will take

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, number: int, reward: float, seconds: float) -> None:
        """Tell of an iteration.

        Args:
            number: its pictures.
            reward: their mean.
            seconds: of sampling, scoring and updates, as `metrics.jsonl` has them; images/s is of all iterations here.
        """
        self._done, self._seconds = self._done + number, self._seconds + seconds
        said = f"reward {reward:.3f}, {(self._done - self._first) / self._seconds:.1f} images/s"
        if self._bar is not None:
            self._bar.set_postfix_str(said, refresh=False)
            self._bar.update(number)
            return
        now = time.monotonic()
        if self._shown and (now - self._said >= _EVERY or self._done >= self._total):
            self._said = now
            left = (self._total - self._done) * (now - self._started) / max(1, self._done - self._first)
            ends = f"{duration(left)} left" if self._done < self._total else f"after {duration(now - self._started)}"
            share = f"{self._done / self._total:.0%}"
            print(f"{self._done:,}/{self._total:,} images ({share}), {said}, {ends}", file=self._stream, flush=True)


def duration(seconds: float) -> str:
    """A time for people: two units at most."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def estimated_seconds(pictures: int, sampling: float, config: AgentConfig) -> float:
    """Roughly what a training takes: sampling, and the passes with a gradient that an update makes.

    Args:
        pictures: to sample.
        sampling: seconds of one picture, its reward included.
        config: the agent's options.
    """
    first, last = config.trained_steps
    passes = (last - first) * config.timestep_fraction * getattr(config, "inner_epochs", 1)
    return pictures * sampling * (1 + _WITH_GRADIENT * passes)
