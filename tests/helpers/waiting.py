"""Blocks that must not wait, as for a network; the bound leaves room for a machine that is busy."""

import time
from contextlib import contextmanager

BOUND = 20.0  # seconds


@contextmanager
def at_once():
    start = time.monotonic()
    yield
    assert time.monotonic() - start < BOUND
