"""What the commands set for their process, which no library may: CPU threads of torch, and memory of the C library."""

from __future__ import annotations

import os

import torch

from diffusion_gym.agents.training.allocator import keep_freed_memory


def check_threads(threads: int) -> None:
    """Refuse a number of threads that this machine has no cores for; 0 is torch's own choice.

    Raises:
        ValueError: the number and what it may be.
    """
    if not 0 <= threads <= cores():
        raise ValueError(
            f"threads={threads!r} must be from 1 to the {cores()} cores of this machine, or 0 for torch's own choice; "
            "give --threads"
        )


def cores() -> int:
    """Processors of this machine, as Python counts them."""
    return os.cpu_count() or 1


def prepare_process(threads: int) -> None:
    """Let torch use so many threads, and the process what it frees, as a command does before it makes an environment.

    Args:
        threads: of torch; 0 leaves its own choice.

    Raises:
        ValueError: there are not so many cores.
    """
    check_threads(threads)
    if threads:
        torch.set_num_threads(threads)
    keep_freed_memory()
