"""Writes the names of ImageNet's animals from timm's class list; the package holds what it wrote.

Get the list with `pip download --no-deps timm==1.0.31`, then run
`python -m tools.build_imagenet_animals --wheel timm-1.0.31-py3-none-any.whl`.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Final

from diffusion_gym.prompts.imagenet_animals import PATH
from diffusion_gym.storage import write_text

ANIMALS: Final = 398  # the classes are ordered by WordNet id; number 398, counted from 0, is the abacus
_INFO: Final = "timm/data/_info"


def build(wheel: Path, out: Path = PATH) -> tuple[str, ...]:
    """Write a name a line, in the order of the classes.

    Args:
        wheel: a wheel of timm; it is read as a zip file, nothing of it is installed or run.
        out: where to.

    Returns:
        The names.

    Raises:
        ValueError: the wheel has no such class list, or another one.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            synsets, lemmas = (
                archive.read(f"{_INFO}/{name}.txt").decode("utf-8").splitlines()
                for name in ("imagenet_synsets", "imagenet_synset_to_lemma")
            )
    except (KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"wheel={str(wheel)!r} is no wheel of timm 1.0 ({error}); get it with pip download") from error
    synonyms = dict(line.split("\t", 1) for line in lemmas if line)
    # A class has several names ("tench, Tinca tinca"); the first is the common one.
    names = [synonyms[synset].split(",")[0].strip() for synset in synsets]
    if names[ANIMALS : ANIMALS + 1] != ["abacus"] or len(set(names[:ANIMALS])) != ANIMALS:
        raise ValueError(f"wheel={str(wheel)!r} orders the classes in another way; use timm 1.0.31")
    write_text(out, "\n".join(names[:ANIMALS]) + "\n")
    return tuple(names[:ANIMALS])


if __name__ == "__main__":
    import tyro

    print(f"{len(tyro.cli(build))} names")
