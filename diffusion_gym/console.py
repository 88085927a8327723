"""The program `diffusion-gym`: Ctrl-C ends it in one line also while it imports what it needs, which takes seconds."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import NoReturn


def main() -> None:
    """Run the command of this process's words."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # else it is ignored, as by a job in a shell's background
        signal.signal(signal.SIGINT, _stop)
    from diffusion_gym.agents.cli import main as run

    signal.signal(signal.SIGINT, before)
    run()


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    # Not an exception: a library whose import it interrupts may turn it into another.
    os.write(2, b"error: stopped at once\n")
    os._exit(130)
