"""The signals that ask a command to end: Ctrl-C, and what schedulers and closed terminals send; and how it ends."""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Final, NoReturn

from diffusion_gym.rewards.awaiting import unanswered
from diffusion_gym.rewards.worker import abandoned

# SIGUSR1 is what SLURM's `--signal=USR1@120` sends before the time is up.
ENDING: Final = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
)

_POLL: Final = 0.25  # seconds
_PATIENCE: Final = 10.0  # seconds that a reward may take to answer once the run is to end; schedulers wait for 30


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


class Ending:
    """A run that ends after its iteration when a signal asks for it; at once by a second Ctrl-C.

    A run that is to end also ends at once where its reward does not answer: not within 10 s, and not within twice the
    time that it has ever taken.
    """

    def __init__(self) -> None:
        self._since: float | None = None

    @property
    def asked(self) -> bool:
        """Whether the run is to end."""
        return self._since is not None

    @contextmanager
    def listening(self, say: Callable[[str], None]) -> Iterator[None]:
        """Within this context of the main thread signals are heard; earlier ones are forgotten.

        Args:
            say: called once with what to tell the user, when the run is to end.

        Raises:
            KeyboardInterrupt: the run is to end at once; it says which reward does not answer, if that is why.
        """
        self._since = None

        def ask(signum: int) -> None:
            if not self.asked:
                self._since = time.monotonic()
                by = "" if signum == signal.SIGINT else f" ({signal.Signals(signum).name})"
                say(f"Stopping after this iteration{by}; press Ctrl-C again to stop at once.")
            elif (late := self._late()) is not None:
                raise KeyboardInterrupt(f"{late} to a run that is to end")
            elif signum == signal.SIGINT:
                raise KeyboardInterrupt

        with on_ending(ask), _calling_again(lambda: self._late() is not None):
            yield

    def _late(self) -> str | None:
        """The reward that keeps a run from ending, as part of a message."""
        if self._since is None or time.monotonic() - self._since < _PATIENCE:
            return None
        return unanswered(_PATIENCE)


@contextmanager
def _calling_again(when: Callable[[], bool]) -> Iterator[None]:
    """Within this context of the main thread, the handler of SIGTERM is called whenever `when` says so.

    It may raise, which interrupts what the thread waits for. Elsewhere than in the main thread nothing happens.

    Args:
        when: asked in another thread, a few times a second.
    """
    main, ended = threading.current_thread(), threading.Event()

    def call() -> None:
        while not ended.wait(_POLL):
            if when() and callable(signal.getsignal(signal.SIGTERM)):
                # A signal, since a flag would not have the system call return that the thread is in.
                signal.pthread_kill(main.ident or 0, signal.SIGTERM)

    thread = threading.Thread(target=call, name="ending", daemon=True)
    if main is threading.main_thread() and hasattr(signal, "pthread_kill"):
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if thread.is_alive():
            thread.join()  # none of its signals may come when the handler is no longer there


def leave(code: int) -> NoReturn:
    """End the program; where a reward hangs in a library's code, without what Python does at the end.

    Python would have that thread unwind, at which PyTorch's code aborts the process with an exit code of its own.
    """
    if abandoned():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)
