"""The lowest versions that pyproject.toml declares, as pins for pip: `python tools/floors.py > floors.txt`.

torch is left out: `make test-floors` takes the one of constraints.txt, because an old wheel brings gigabytes of CUDA.
"""

import re
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
EXTRAS = ("sb3", "tianshou", "torchrl", "ray", "serve", "ocr")


def floors(project: Path = PROJECT) -> list[str]:
    """`name==lowest` of every package that the product, or an extra for users, needs.

    Raises:
        ValueError: a package is declared otherwise than by `name>=lowest`.
    """
    declared = tomllib.loads(project.read_text())["project"]
    extras = declared["optional-dependencies"]
    pins = []
    for needed in [*declared["dependencies"], *(package for extra in EXTRAS for package in extras[extra])]:
        parts = re.fullmatch(r"([\w.-]+)>=([\w.]+)", needed)
        if not parts:
            raise ValueError(f"{project.name} declares {needed!r}; write name>=lowest, which can be tested")
        pins.append(f"{parts[1]}=={parts[2]}")
    return [pin for pin in pins if not pin.startswith("torch==")]


if __name__ == "__main__":
    print("\n".join(floors()))
