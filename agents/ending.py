"""The signals that ask a command to end: Ctrl-C, and what schedulers and closed terminals send."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Final

# SIGUSR1 is what SLURM's `--signal=USR1@120` sends before the time is up.
ENDING: Final = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
)


@contextmanager
def on_ending(act: Callable[[int], None], signals: Sequence[int] = ENDING) -> Iterator[None]:
    """Within this context `act` is called with each of the signals that arrives, in place of an end at once.

    A signal that is ignored, as SIGHUP under nohup, stays so. Outside the main thread, signals are the caller's
    business.

    Args:
        act: what to do; it may raise.
        signals: which ones.
    """

    def handle(signum: int, frame: FrameType | None) -> None:
        if signum == getattr(signal, "SIGHUP", None):
            _leave_the_terminal()
        act(signum)

    with ExitStack() as restored:
        for signum in signals:
            before = signal.getsignal(signum)
            if before is signal.SIG_IGN or before is None:
                continue
            try:
                signal.signal(signum, handle)
            except ValueError:  # not the main thread
                break
            restored.callback(signal.signal, signum, before)
        yield


def _leave_the_terminal() -> None:
    """What is printed from here on goes nowhere: to write to a terminal that is gone is an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        try:
            if stat.S_ISCHR(os.fstat(stream).st_mode):
                os.dup2(nowhere, stream)
        except OSError:  # it was closed
            continue
    os.close(nowhere)
