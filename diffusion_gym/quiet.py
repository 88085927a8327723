"""Keeps the chatter of transformers, and of libraries that log as it does, off the console."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet(*others: Any) -> Iterator[None]:
    """Within this context the library shows errors only, and no progress bars; afterwards as before.

    Args:
        *others: the `logging` modules of further libraries with the same functions.
    """
    from transformers.utils import logging

    libraries = (logging, *others)
    levels = [library.get_verbosity() for library in libraries]
    bars = [library.is_progress_bar_enabled() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level, bar in zip(libraries, levels, bars, strict=True):
            library.set_verbosity(level)
            if bar:
                library.enable_progress_bar()
