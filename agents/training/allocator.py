"""The C library's memory, of which each pass of a training on a CPU takes hundreds of MB and gives them back."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Final

_TRIM_THRESHOLD: Final = -1  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h
_MMAP_THRESHOLD: Final = -3
_KEPT: Final = 2**30  # bytes
_SAID: Final = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Let glibc keep up to 1 GB of what is freed for the next pass, as PyTorch does on a GPU.

    By default glibc returns large blocks to the system, which hands them out anew page by page, cleared, which costs
    time (`python benchmarks/peers/allocator.py`). The peak stays what it was, but the process does not shrink after it.

    Returns:
        Whether it does. Not where the C library is another one, or where the environment says what it is to do
        (`MALLOC_TRIM_THRESHOLD_`, `MALLOC_MMAP_THRESHOLD_` or `GLIBC_TUNABLES`).
    """
    if sys.platform != "linux" or any(name in os.environ for name in _SAID):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return all([library.mallopt(option, _KEPT) == 1 for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD)])
