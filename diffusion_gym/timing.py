"""Where time goes: spans name the phases of a program, a timeline says how long each took.

A timeline is a sequence of marks, one wherever a span begins or ends. The time between two marks belongs to the
innermost span that is open then, or to `other`: so nothing counts twice, and the parts add up to the whole.

On a GPU the marks are CUDA events on the stream of the work. The time between two of them is the device's own, with
its idle time while it waits for the host, and no host waits for a device before the timeline is read. Summing up
torch.profiler's kernels would give less, at more cost: the profiler slows down what it measures and keeps each
operation of each iteration in memory. It is for the trace alone, of which a watcher has charge (see `Timeline`); the
spans are in it as `torch.profiler.record_function`, which is slow enough to be left out otherwise.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch

OTHER: Final = "other"  # the phase of what lies in no span
_OFF: Final = nullcontext()

Watch = Callable[[str, int, bool], None]


class Clock(Protocol):
    """Takes marks, and says later how far apart they are."""

    def mark(self) -> Any:
        """This moment."""

    def seconds(self, marks: Sequence[Any]) -> list[float]:
        """The seconds from each mark to the next, one fewer than marks."""


class HostClock:
    """The host's clock."""

    def mark(self) -> float:
        """Now."""
        return time.perf_counter()

    def seconds(self, marks: Sequence[float]) -> list[float]:
        """Differences."""
        return [after - before for before, after in zip(marks, marks[1:], strict=False)]


class DeviceClock:
    """The clock of a CUDA device: events on its current stream, which nothing waits for before they are read.

    Args:
        device: the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device)

    def mark(self) -> torch.cuda.Event:
        """When the stream comes to here."""
        return self._stream.record_event(torch.cuda.Event(enable_timing=True))

    def seconds(self, marks: Sequence[torch.cuda.Event]) -> list[float]:
        """The device's seconds between them; waits for the last."""
        if marks:
            marks[-1].synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in zip(marks, marks[1:], strict=False)]


def clock_of(device: torch.device) -> Clock:
    """The device's own clock where it is a CUDA device, else the host's."""
    return DeviceClock(device) if device.type == "cuda" else HostClock()


@dataclass(frozen=True)
class Phase:
    """All spans of one name.

    Attributes:
        seconds: in them, without those of the spans inside.
        calls: how many spans; 0 for `other`.
    """

    seconds: float
    calls: int


class Timeline:
    """The spans of one thread; `timed` makes one.

    Args:
        clock: takes the marks.
        watch: called before each span with its name, the number of earlier ones of that name, and whether it is whole;
            the time that it takes belongs to no phase. With it, torch.profiler sees the spans by name.
    """

    def __init__(self, clock: Clock, watch: Watch | None = None) -> None:
        self._clock, self._watch = clock, watch
        self._open = [OTHER]
        self._calls: Counter[str] = Counter()
        self._marks: list[Any] = []
        self._owners: list[str | None] = []  # whose the time from each mark to the next is
        self.labelled = watch is not None
        self.whole = False  # whether the span that is open takes the time of those inside

    def mark(self, owner: str | None = None) -> None:
        """From here on time is that of `owner`, or nobody's."""
        self._marks.append(self._clock.mark())
        self._owners.append(owner)

    def enter(self, name: str, whole: bool) -> None:
        """A span begins."""
        if self._watch is not None:
            self.mark()
            self._watch(name, self._calls[name], whole)
        self._open.append(name)
        self._calls[name] += 1
        self.whole = whole
        self.mark(name)

    def leave(self) -> None:
        """The innermost span ends."""
        self._open.pop()
        self.whole = False
        self.mark(self._open[-1])

    def phases(self) -> dict[str, Phase]:
        """The phases by name; on a GPU this waits for the device. To be asked once, at the end."""
        totals: dict[str, float] = {}
        for owner, seconds in zip(self._owners, self._clock.seconds(self._marks), strict=False):
            if owner is not None:
                totals[owner] = totals.get(owner, 0.0) + seconds
        return {name: Phase(seconds, self._calls[name]) for name, seconds in totals.items()}


class _Current(threading.local):
    timeline: Timeline | None = None


class _Span:
    __slots__ = ("_label", "_name", "_timeline", "_whole")

    def __init__(self, timeline: Timeline, name: str, whole: bool) -> None:
        self._timeline, self._name, self._whole = timeline, name, whole

    def __enter__(self) -> None:
        self._timeline.enter(self._name, self._whole)
        self._label: Any = torch.profiler.record_function(self._name) if self._timeline.labelled else _OFF
        self._label.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._label.__exit__(*error)
        self._timeline.leave()


_current = _Current()


def span(name: str, *, whole: bool = False) -> AbstractContextManager[None]:
    """Within this context time is that of the phase `name`, where this thread is being timed; else nothing happens.

    Args:
        name: the phase, the same for all spans of a kind.
        whole: the time of spans inside is this one's too.
    """
    timeline = _current.timeline
    return _OFF if timeline is None or timeline.whole else _Span(timeline, name, whole)


@contextmanager
def timed(clock: Clock, watch: Watch | None = None) -> Iterator[Timeline]:
    """Within this context the spans of this thread are timed, those of other threads not.

    Args:
        clock: see `clock_of`.
        watch: see `Timeline`.

    Raises:
        RuntimeError: this thread is being timed already.
    """
    if _current.timeline is not None:
        raise RuntimeError("this thread is being timed already; end that first")
    timeline = _current.timeline = Timeline(clock, watch)
    timeline.mark(OTHER)
    try:
        yield timeline
        timeline.mark()
    finally:
        _current.timeline = None
