"""The program `diffusion-gym`: help and version are answered without the package, whose import takes seconds.

Ctrl-C ends it in one line also during that import. It is a module of its own because importing one from within the
package imports the package, and with it torch.
"""

from __future__ import annotations

import ast
import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn


def main() -> None:
    """Run the command of this process's words."""
    first = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if first in ("-h", "--help"):
        print(_constant("agents/cli.py", "_USAGE"))
    elif first == "--version":
        print(f"diffusion-gym {_constant('_version.py', 'VERSION')}")
    else:
        run_command()


def run_command() -> None:
    """Run the command of this process's words by the package."""
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


def _constant(path: str, name: str) -> Any:
    """The value that a file of the package gives a name, read without importing it."""
    spec = find_spec("diffusion_gym")  # finds the package, and does not import it
    assert spec is not None and spec.submodule_search_locations is not None
    tree = ast.parse((Path(spec.submodule_search_locations[0]) / path).read_text(encoding="utf-8"))
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id == name and isinstance(node, ast.Assign | ast.AnnAssign):
            return ast.literal_eval(node.value) if node.value else None
    raise AttributeError(f"{path} has no {name}")
