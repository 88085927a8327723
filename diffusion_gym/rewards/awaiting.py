"""What the main thread waits for: there signals are heard, and a command that is to end must not wait for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_LONGEST: Final[dict[str, float]] = {}  # seconds that a reward has taken to answer, by its name
_NOW: Final[list[tuple[str, float]]] = []  # the reward that is waited for, and since when; empty or one


@contextmanager
def awaiting(name: str) -> Iterator[None]:
    """Within this context the main thread waits for the reward `name`; a context in it, or in a thread, says nothing.

    Args:
        name: what errors call the reward.
    """
    if _NOW or threading.current_thread() is not threading.main_thread():
        yield
        return
    begin = time.monotonic()
    _NOW.append((name, begin))
    try:
        yield
    finally:
        _NOW.clear()
    _LONGEST[name] = max(_LONGEST.get(name, 0.0), time.monotonic() - begin)


def unanswered(patience: float) -> str | None:
    """The reward that does not answer, as part of a message; None where none is waited for, or not for long.

    Long is more than `patience` seconds, and more than twice as long as that reward has ever taken.
    """
    for name, begin in list(_NOW):  # one look: it may change in the main thread
        seconds = time.monotonic() - begin
        if seconds > max(patience, 2 * _LONGEST.get(name, 0.0)):
            return f"reward={name!r} has not answered for {seconds:.0f} s"
    return None
