"""How much of a device's matrix rate a piece of work uses."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import torch

_SIZE: Final = {"cuda": 8192, "cpu": 1024}
_CALLS: Final = 10


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large square matrix product, the fastest of several."""
    kind = torch.device(device).type
    size = _SIZE.get(kind, 1024)
    one, two = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(_CALLS):
        synchronize(device)
        started = time.perf_counter()
        one @ two
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def operations(work: Callable[[], object]) -> int:
    """Floating-point operations of `work()`: matrix products, convolutions and attention, as PyTorch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def synchronize(device: str) -> None:
    """Wait until the device has done what it was asked."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
