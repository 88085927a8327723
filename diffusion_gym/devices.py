"""Devices by name, and the only place where values move from the host to one."""

from __future__ import annotations

import os
from typing import Any

import torch


def device_called(device: torch.device | str) -> torch.device:
    """The device of a name such as `cpu`, `cuda` or `cuda:0`.

    Raises:
        ValueError: an unknown name, or a GPU where there is none.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r} is unknown; use 'cpu', 'cuda' or 'cuda:0'") from error
    if not _available(found):
        raise ValueError(f"device={str(device)!r} is not available here; use device='cpu'")
    return found


def _available(device: torch.device) -> bool:
    if device.type == "cuda":  # a tensor would begin to use the GPU
        return (device.index or 0) < torch.cuda.device_count()
    try:
        return device.type != "meta" and torch.empty(0, device=device).numel() == 0
    except (RuntimeError, NotImplementedError, AssertionError, ImportError):
        return False


def memory_of(device: torch.device) -> int | None:
    """Bytes of memory of the machine, or of a GPU; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def require_memory(what: str, numbers: int, device: torch.device, remedy: str) -> None:
    """Refuse what cannot fit, before it is allocated.

    Args:
        what: the argument and its value.
        numbers: float32 numbers that it takes, at the least.
        device: where.
        remedy: what to do.

    Raises:
        ValueError: all memory of the device is less.
    """
    there = memory_of(device)
    if there is not None and 4 * numbers > there:
        raise ValueError(
            f"{what} would take at least {4 * numbers / 2**30:.0f} GiB, and {device} has {there / 2**30:.0f}; {remedy}"
        )


def numbered(device: torch.device) -> torch.device:
    """The device as its tensors call it: `cuda` is the current GPU, such as `cuda:0`, and there is one `cpu`."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if device.type == "cpu" else device


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of a tensor that is spread over several, a view; any other tensor as it is."""
    to_local: Any = getattr(tensor, "to_local", None)  # of a DTensor, whose module is slow to import
    return tensor if to_local is None else to_local()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that is spread over several processes as one, which all of them ask for; any other tensor as it is."""
    gather: Any = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


@torch.no_grad()
def put(place: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a value into a tensor, of which this process may have a part alone; no other process is needed.

    Args:
        place: a tensor, whole or spread over processes along its first dimension.
        value: a whole tensor of its shape, or one that is spread in the same way.
    """
    mesh: Any = getattr(place, "device_mesh", None)
    if mesh is not None and not hasattr(value, "to_local"):
        parts, index = value.chunk(mesh.size()), mesh.get_local_rank()
        value = parts[index] if index < len(parts) else value[:0]
    local_part(place).copy_(local_part(value))


def to_device(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor of `values` on `device`; a GPU is not waited for.

    A plain copy of pageable memory to a GPU waits until all that was queued before it is done; one of pinned memory is
    queued itself.

    Args:
        values: a NumPy array or a tensor. On the CPU the result may share its memory.
        device: where it goes.
        dtype: its type there; that of `values` by default.
    """
    tensor = torch.as_tensor(values, dtype=dtype)
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
