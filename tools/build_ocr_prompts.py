"""Writes the prompt set `ocr`, scenes with a text in them; the package holds what it wrote.

`python -m tools.build_ocr_prompts`
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from diffusion_gym.prompts.ocr import PATH
from diffusion_gym.storage import write_text

SCENES: Final = (
    'a street sign that reads "{}"',
    'a shop window with the word "{}" painted on it',
    'a birthday cake with "{}" written in icing',
    'a blackboard with "{}" in white chalk',
    'a neon sign that says "{}" above a bar',
    'a white T-shirt with "{}" printed on it',
    'the cover of a book with the title "{}"',
    'a wooden board by a path that says "{}"',
)
NEW_SCENES: Final = (
    'a coffee mug with "{}" on it',
    'a robot that holds up a cardboard sign with "{}"',
    'a train ticket with "{}" in large letters',
)
TEXTS: Final = tuple(
    """OPEN|CLOSED|STOP|EXIT|SALE|TAXI|HELLO|BAKERY|LIBRARY|MUSEUM|HOTEL|PARKING|MARKET|SUMMER|WINTER|GARDEN|
    Welcome|Thank you|Good luck|Keep left|No entry|Fresh bread|Happy day|Slow down|Room 12|Gate 7|Route 66|
    Platform 9|Since 1984|50 percent off|Level 3|Open late|Mind the gap|Deep learning|Home sweet home|
    Have a nice day|Please do not touch|Coffee and cake|Best in town|See you soon""".replace("\n    ", "").split("|")
)
NEW_TEXTS: Final = tuple(
    "BOOKS|CINEMA|FLOWERS|SPRING|Night shift|Watch out|Gate 21|Room 305|Save water|Work in progress|Free parking|"
    "Enjoy the silence".split("|")
)


def lines() -> Iterator[dict[str, str]]:
    """The lines of the file: every text in every scene, but for new texts in new scenes."""
    for scenes, texts, split in (
        (SCENES, TEXTS, None),
        (SCENES, NEW_TEXTS, "new-texts"),
        (NEW_SCENES, TEXTS, "new-scenes"),
    ):
        for scene in scenes:
            for text in texts:
                yield {"prompt": scene.format(text), "text": text, **({"held_out": split} if split else {})}


def build(out: Path = PATH) -> int:
    """Write the file; returns its number of lines.

    Args:
        out: where to.
    """
    found = [json.dumps(line) for line in lines()]
    write_text(out, "\n".join(found) + "\n")
    return len(found)


if __name__ == "__main__":
    import tyro

    print(f"{tyro.cli(build)} prompts")
