"""What a reward server takes and holds, and how much it logs. docs/reward-server.md has the table."""

from __future__ import annotations

import logging
import math
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final

_SHARE: Final = 16  # of the memory for one request: as float32, and copied, its pictures take half of it all


@dataclass(frozen=True)
class Limits:
    """What a reward server takes.

    Raises:
        ValueError: a limit that is not positive, or a `max_memory` too small for the requests.
    """

    max_batch: int = 64
    """Pictures in one request, and scored at once: waiting requests are merged up to it."""
    max_queue: int = 16
    """Requests that wait or are scored at a time; a client beyond it is asked to wait (HTTP 503)."""
    max_bytes: int = 2**26
    """Bytes of one request."""
    max_memory: int = 2**30
    """Bytes of all requests and their unpacked pictures, at 3 bytes a pixel; one request unpacks to a sixteenth of it
    at most. While it reads and scores, the server takes up to twice as much beside it, and the reward its own."""
    max_connections: int = 128
    """Connections at a time; when there is one more, the one that has kept the server waiting longest is closed."""
    client_seconds: float = 10.0
    """Seconds that a client may take for its headers, and for its body beside a second for each 16 KiB."""
    reward_seconds: float = 600.0
    """Seconds for one call of the reward; until a longer one has returned, clients are asked to wait (HTTP 503)."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 1 if isinstance(value, int) else 0.001
            if not (value >= least and math.isfinite(value)):
                raise ValueError(f"{name}={value!r} must be at least {least} and finite")
        if self.max_memory < _SHARE * self.max_bytes:
            raise ValueError(
                f"max_memory={self.max_memory} must be at least {_SHARE} * max_bytes={_SHARE * self.max_bytes}; "
                "raise it or lower max_bytes"
            )

    @property
    def max_unpacked(self) -> int:
        """Bytes of one request's pictures, unpacked at 3 bytes a pixel; also of those that are scored at once."""
        return self.max_memory // _SHARE


class MemoryFull(Exception):
    """The requests hold all the memory that they may."""


class Memory:
    """Bytes that requests hold together, counted before they are allocated."""

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0
        self._lock = threading.Lock()

    def add(self, number: int) -> None:
        """Count `number` bytes more, or fewer where it is negative.

        Raises:
            MemoryFull: there would be more than `most`; nothing is counted.
        """
        with self._lock:
            if number > 0 and self.held + number > self.most:
                raise MemoryFull(f"the requests hold {self.held} of max_memory={self.most} bytes already")
            self.held += number


class Share:
    """One request's part of the memory, given back at the end of its context."""

    def __init__(self, memory: Memory) -> None:
        self._memory, self._taken = memory, 0

    def __enter__(self) -> Share:
        return self

    def __exit__(self, *_: object) -> None:
        self.take(-self._taken)

    def take(self, number: int) -> None:
        """Take `number` bytes more, or give them back where it is negative.

        Raises:
            MemoryFull: there are not so many.
        """
        self._memory.add(number)
        self._taken += number

    def leave_to(self, job: Future[Any]) -> None:
        """Have `job` give the bytes back when it ends, which is later than its request where the client leaves."""
        number, self._taken = self._taken, 0
        job.add_done_callback(lambda _: self._memory.add(-number))


class FewLines(logging.Filter):
    """Lets `most` records pass in `seconds`; the next one after says how many were left out."""

    def __init__(self, most: int = 20, seconds: float = 60.0) -> None:
        super().__init__()
        self._most, self._seconds = most, seconds
        self._begin, self._seen = -math.inf, 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether `record` is written."""
        if record.created - self._begin >= self._seconds:
            if (left_out := self._seen - self._most) > 0:
                record.msg, record.args = f"{record.getMessage()} [{left_out} earlier messages were left out]", None
            self._begin, self._seen = record.created, 0
        self._seen += 1
        return self._seen <= self._most
