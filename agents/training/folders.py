"""The folders that commands write into: which one a command may take, who holds it, what may name a file in it."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from diffusion_gym.agents.processes import Processes
from diffusion_gym.schemas import Count, Schema, read_checked
from diffusion_gym.storage import is_unfinished, write_json

_LOCK: Final = ".lock"
_HOLDER: Final = ".holder.json"
_OURS: Final = frozenset({_LOCK, _HOLDER, ".seal.json"})  # the last is that of `trust`
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+]*(-[A-Za-z0-9_.+]+)*")
_LONGEST: Final = 100


def check_name(kind: str, name: Any) -> str:
    """`name`, which becomes a part of file names.

    Args:
        kind: the argument that error messages name.
        name: letters, digits, `_`, `.`, `+` and single hyphens, at most 100; it begins with no full stop.

    Raises:
        ValueError: it could name something elsewhere, or is no such name.
    """
    if not isinstance(name, str) or len(name) > _LONGEST or not _NAME.fullmatch(name):
        raise ValueError(
            f"{kind}={name!r} names files, so that it must be of letters, digits, '_', '.', '+' and single hyphens "
            f"between them, at most {_LONGEST}, and not begin with '.'"
        )
    return name


def content(folder: Path) -> list[Path]:
    """What a folder holds, without locks, seal and what a kill in a write left; nothing where there is no folder."""
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if path.name not in _OURS and not is_unfinished(path)]


def check_out(folder: Path, what: str, own: Callable[[Path], bool]) -> None:
    """Refuse to write into a folder that holds other files than the command's own.

    Args:
        folder: the `--out`; it may be missing.
        what: what the command makes, such as `run`.
        own: whether a folder that is not empty is one that the command made.

    Raises:
        FileExistsError: it holds something else, or is a file.
    """
    is_file = folder.exists() and not folder.is_dir()
    if is_file or (content(folder) and not own(folder)):
        raise FileExistsError(f"out={str(folder)!r} is not empty and no {what} of diffusion-gym; choose another --out")


@contextmanager
def holding(folder: Path, processes: Processes | None = None) -> Iterator[None]:
    """Within this context no other process, of this machine or of another that sees the folder, can hold it.

    The operating system holds the lock and ends it with the process, whatever ends that. The same process may hold a
    folder several times. A folder that was made for the lock alone, and is still empty at the end, is removed.

    Args:
        folder: the folder; made if it is not there.
        processes: those of one launch are one holder: the main one, which alone writes, holds the lock for all.

    Raises:
        FileExistsError: another process holds the folder; the message says which one, where, and since when.
        OSError: the folder cannot be made, or its file system cannot lock.
        PeerFailed: one of these in the main process.
    """
    shared = processes or Processes()
    with ExitStack() as held:
        failure: OSError | None = None
        if shared.main:
            try:
                held.enter_context(_held(folder))
            except OSError as error:
                failure = error
        shared.agree(failure)
        yield


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / _LOCK, timeout=0, is_singleton=True, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise FileExistsError(_taken(folder)) from None
    outermost = lock.lock_counter == 1
    try:
        if outermost:
            since = datetime.now(UTC).isoformat(timespec="seconds")
            write_json(folder / _HOLDER, {"pid": os.getpid(), "host": socket.gethostname(), "since": since})
        yield
    finally:
        if outermost:
            _leave(folder)
        lock.release()


def _leave(folder: Path) -> None:
    (folder / _HOLDER).unlink(missing_ok=True)
    (folder / _LOCK).unlink(missing_ok=True)  # while it is held: whoever has opened it meanwhile finds it gone
    with suppress(OSError):
        folder.rmdir()  # only where it is empty


class _Holder(Schema):
    pid: Count
    host: str
    since: str


def _taken(folder: Path) -> str:
    try:
        held = read_checked(_Holder, folder / _HOLDER, "")
        who = f"process {held.pid} on {held.host}, since {held.since}"
    except (OSError, ValueError):  # it has just begun, or just ended
        who = "another process"
    return f"out={str(folder)!r} is in use by {who}; wait for its end, stop it, or choose another --out"
