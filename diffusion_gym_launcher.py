"""The program `diffusion-gym`: help and version are answered without the package, whose import takes seconds.

It is a module of its own because importing one from within the package imports the package, and with it torch.
"""

from __future__ import annotations

import ast
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def main() -> None:
    """Run the command of this process's words."""
    first = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if first in ("-h", "--help"):
        print(_constant("agents/cli.py", "_USAGE"))
    elif first == "--version":
        print(f"diffusion-gym {_constant('_version.py', 'VERSION')}")
    else:
        from diffusion_gym.console import main as run

        run()


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
