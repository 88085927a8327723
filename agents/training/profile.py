"""`train --profile`: where the time of an iteration goes, as a table, as JSON and as a Chrome trace."""

from __future__ import annotations

import gzip
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from diffusion_gym.storage import json_text, write_bytes, write_json
from diffusion_gym.timing import OTHER, Clock, Phase, clock_of, timed

_TRACED_CALLS: Final = 4  # of each phase; an iteration of Stable Diffusion has millions of operations
_COMPRESSED_FROM: Final = 50_000_000  # bytes
_VIEWERS: Final = "https://ui.perfetto.dev or chrome://tracing"


@dataclass(frozen=True)
class Row:
    """A phase of the mean iteration.

    Attributes:
        phase: its name.
        seconds: an iteration.
        share: of the iteration, in percent.
        calls: an iteration; None for what lies in no span.
    """

    phase: str
    seconds: float
    share: float
    calls: float | None


class Profile:
    """Times a training's iterations and traces one of them.

    The first iteration, which warms up, and the traced one, which the profiler slows down, are left out of the table
    when there are others.

    Args:
        device: where the training computes; a GPU is timed by its own clock.
        clock: another clock.
    """

    def __init__(self, device: torch.device, clock: Clock | None = None) -> None:
        self.device = device
        self._clock = clock or clock_of(device)
        self._iterations: list[dict[str, Phase]] = []
        self._traced = -1
        self._trace = Trace(device)

    @contextmanager
    def iteration(self, last: bool) -> Iterator[None]:
        """Time what is done within this context; an iteration that fails does not count.

        Args:
            last: there will be no other; the second one is traced, or the last where none follows the first.
        """
        number = len(self._iterations)
        traced = self._traced < 0 and (number == 1 or last)
        try:
            with timed(self._clock, self._trace.watch if traced else None) as timeline:
                yield
        finally:
            self._trace.pause()
        self._iterations.append(timeline.phases())
        if traced:
            self._traced = number

    def averaged(self) -> list[dict[str, Phase]]:
        """The iterations behind the table."""
        later = list(enumerate(self._iterations))[1:]
        untraced = [phases for number, phases in later if number != self._traced]
        return untraced or [phases for _, phases in later] or self._iterations

    def rows(self) -> list[Row]:
        """The phases of the mean iteration, the longest first and what lies in no span last."""
        iterations = self.averaged()
        totals: dict[str, Phase] = {}
        for phases in iterations:
            for name, phase in phases.items():
                before = totals.get(name, Phase(0.0, 0))
                totals[name] = Phase(before.seconds + phase.seconds, before.calls + phase.calls)
        whole, count = sum(phase.seconds for phase in totals.values()), len(iterations)
        ordered = sorted(totals.items(), key=lambda entry: (entry[0] == OTHER, -entry[1].seconds))
        return [
            Row(
                name,
                phase.seconds / count,
                100 * phase.seconds / whole if whole else 0.0,
                None if name == OTHER else phase.calls / count,
            )
            for name, phase in ordered
        ]

    def write(self, folder: Path) -> str:
        """Write `profile.json` and the trace into the run folder, nothing if no iteration was finished.

        Returns:
            The table, and where the files are.

        Raises:
            OSError: a file could not be written.
        """
        if not self._iterations:
            return "profile: no iteration was finished"
        rows, averaged = self.rows(), self.averaged()
        path = folder / "profile.json"
        write_json(
            path,
            {
                "device": self.device.type,
                "iterations": len(self._iterations),
                "averaged_iterations": len(averaged),
                "seconds_per_iteration": sum(row.seconds for row in rows),
                "phases": [asdict(row) for row in rows],
            },
        )
        lines = [*_table(rows, f"mean of {len(averaged)} of {len(self._iterations)}"), f"Numbers: {path}"]
        if (trace := self._trace.write(folder)) is None:
            return "\n".join([*lines, "No trace: the run ended before the iteration that is traced"])
        return "\n".join([*lines, f"Trace of one iteration: {trace}; open it at {_VIEWERS}"])


def _table(rows: list[Row], title: str) -> Iterator[str]:
    width = max(len(name) for name in ("iteration", *(row.phase for row in rows)))
    yield f"Where the time of an iteration goes ({title})"
    yield f"{'phase':{width}}  seconds    share     calls"
    for row in rows:
        calls = "" if row.calls is None else f"{row.calls:.1f}".removesuffix(".0")
        yield f"{row.phase:{width}} {row.seconds:8.3f} {row.share:6.1f} % {calls:>9}".rstrip()
    yield f"{'iteration':{width}} {sum(row.seconds for row in rows):8.3f} {sum(row.share for row in rows):6.1f} %"


class Trace:
    """The operations of the first calls of each phase, by torch.profiler.

    A whole iteration may be too long for the profiler's memory and for any viewer, and its calls are alike. So the
    profiler runs in several sessions, each over spans that are still to be traced; all have one time axis.

    Args:
        device: whose kernels are traced besides the host's operations.
    """

    def __init__(self, device: torch.device) -> None:
        # Read at the first session: the profiler's library would say two lines of each session on the progress bar.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        kinds = torch.profiler.ProfilerActivity
        self._activities = [kinds.CPU, *([kinds.CUDA] if device.type == "cuda" else [])]
        self._sessions: list[torch.profiler.profile] = []
        self._running = False

    def watch(self, name: str, calls: int, whole: bool) -> None:
        """Run for a span if it is among the first; see `Timeline`. A whole one may be long, and is left out."""
        if calls >= _TRACED_CALLS or whole:
            self.pause()
        elif not self._running:
            session = torch.profiler.profile(activities=self._activities)
            session.start()
            self._sessions.append(session)
            self._running = True

    def pause(self) -> None:
        """Stop until the next span that is to be traced."""
        if self._running:
            self._running = False
            self._sessions[-1].stop()

    def write(self, folder: Path) -> Path | None:
        """Write `trace.json`, or `trace.json.gz` where it is large; None if nothing was traced."""
        if not self._sessions:
            return None
        data = json_text(self._joined()).encode()
        plain, compressed = folder / "trace.json", folder / "trace.json.gz"
        large = len(data) > _COMPRESSED_FROM
        path, other = (compressed, plain) if large else (plain, compressed)
        write_bytes(path, gzip.compress(data, mtime=0) if large else data)
        other.unlink(missing_ok=True)
        return path

    def _joined(self) -> dict[str, Any]:
        """The sessions as one trace, without the names of the machine and of its files."""
        joined: dict[str, Any] = {}
        events: list[dict[str, Any]] = []
        for number, session in enumerate(self._sessions):
            part = _exported(session)
            for event in part.pop("traceEvents"):
                if event["ph"] in "stf" and isinstance(event.get("id"), int):
                    event["id"] += number * 10**9  # arrows are numbered anew in each session
                events.append(event)
            joined = part | joined
        return {**{key: value for key, value in joined.items() if key not in _ABOUT_MACHINE}, "traceEvents": events}


_ABOUT_MACHINE: Final = ("host_name", "traceName")


def _exported(session: torch.profiler.profile) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        session.export_chrome_trace(str(path))
        found: dict[str, Any] = json.loads(path.read_bytes())
        return found
