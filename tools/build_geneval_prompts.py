"""Writes prompts of GenEval's six categories with their metadata, drawn anew: these are not the 553 published ones.

`python -m tools.build_geneval_prompts` writes the set `geneval-like`; `--number 1000 --seed 1 --out mine.jsonl` others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from diffusion_gym.english import NUMBERS, article, plural
from diffusion_gym.prompts.geneval_like import PATH
from diffusion_gym.rewards.geneval_rules import CATEGORIES, COLORS
from diffusion_gym.storage import write_text

# The classes of COCO, but for scissors and skis, of which there is no single one.
OBJECTS: Final = tuple(
    """person|bicycle|car|motorcycle|airplane|bus|train|truck|boat|traffic light|fire hydrant|stop sign|
    parking meter|bench|bird|cat|dog|horse|sheep|cow|elephant|bear|zebra|giraffe|backpack|umbrella|handbag|tie|
    suitcase|frisbee|snowboard|sports ball|kite|baseball bat|baseball glove|skateboard|surfboard|tennis racket|
    bottle|wine glass|cup|fork|knife|spoon|bowl|banana|apple|sandwich|orange|broccoli|carrot|hot dog|pizza|
    donut|cake|chair|couch|potted plant|bed|dining table|toilet|tv|laptop|mouse|remote|keyboard|cell phone|
    microwave|oven|toaster|sink|refrigerator|book|clock|vase|teddy bear|hair drier|toothbrush""".replace(
        "\n    ", ""
    ).split("|")
)
RELATIONS: Final = ("left of", "right of", "above", "below")
Line = dict[str, Any]


def _draw(rng: np.random.Generator, words: tuple[str, ...], number: int) -> list[str]:
    return [words[index] for index in rng.choice(len(words), size=number, replace=False)]


def _a(phrase: str) -> str:
    return f"{article(phrase)} {phrase}"


def _single_object(rng: np.random.Generator) -> Line:
    (thing,) = _draw(rng, OBJECTS, 1)
    return {"prompt": f"a photo of {_a(thing)}", "include": [{"class": thing, "count": 1}]}


def _two_object(rng: np.random.Generator) -> Line:
    things = _draw(rng, OBJECTS, 2)
    include = [{"class": thing, "count": 1} for thing in things]
    return {"prompt": f"a photo of {' and '.join(map(_a, things))}", "include": include}


def _counting(rng: np.random.Generator) -> Line:
    (thing,), number = _draw(rng, OBJECTS, 1), int(rng.integers(2, 5))
    return {
        "prompt": f"a photo of {NUMBERS[number]} {plural(thing)}",
        "include": [{"class": thing, "count": number}],
        "exclude": [{"class": thing, "count": number + 1}],
    }


def _colored(rng: np.random.Generator, number: int) -> Line:
    things, colors = _draw(rng, OBJECTS[1:], number), _draw(rng, COLORS, number)  # no coloured person
    said = [_a(f"{color} {thing}") for color, thing in zip(colors, things, strict=True)]
    include = [{"class": thing, "count": 1, "color": color} for color, thing in zip(colors, things, strict=True)]
    return {"prompt": f"a photo of {' and '.join(said)}", "include": include}


def _position(rng: np.random.Generator) -> Line:
    (first, second), (relation,) = _draw(rng, OBJECTS, 2), _draw(rng, RELATIONS, 1)
    placed = {"class": first, "count": 1, "position": [relation, 0]}
    said = f"a photo of {_a(first)} {relation} {_a(second)}"
    return {"prompt": said, "include": [{"class": second, "count": 1}, placed]}


_MAKERS: Final[dict[str, Callable[[np.random.Generator], Line]]] = dict(
    zip(
        CATEGORIES,
        (
            _single_object,
            _two_object,
            _counting,
            lambda rng: _colored(rng, 1),
            _position,
            lambda rng: _colored(rng, 2),
        ),
        strict=True,
    )
)


def lines(number: int, held_out: int, seed: int) -> Iterator[Line]:
    """`number` different prompts of each category, and as many more as `held_out` in a split of its name.

    Of single objects there are no more than `OBJECTS`: fewer are trained on.

    Raises:
        ValueError: fewer than one of either.
    """
    if number < 1 or not 1 <= held_out < len(OBJECTS):
        raise ValueError(f"number={number} must be at least 1, held_out={held_out} from 1 to {len(OBJECTS) - 1}")
    rng, seen = np.random.default_rng(seed), set[str]()
    for category, make in _MAKERS.items():
        most = len(OBJECTS) if category == "single_object" else number + held_out
        drawn = 0
        while drawn < min(most, number + held_out):
            line = make(rng)
            if line["prompt"] in seen:
                continue
            seen.add(line["prompt"])
            split = {"held_out": category} if drawn < held_out else {}
            drawn += 1
            yield {**line, "tag": category, **split}


def build(number: int = 120, held_out: int = 25, seed: int = 2026, out: Path = PATH) -> int:
    """Write the file; returns its number of lines.

    Args:
        number: prompts of a category to train on.
        held_out: prompts of a category that are not trained on.
        seed: of the draw.
        out: where to.
    """
    found = [json.dumps(line) for line in lines(number, held_out, seed)]
    write_text(out, "\n".join(found) + "\n")
    return len(found)


if __name__ == "__main__":
    import tyro

    print(f"{tyro.cli(build)} prompts")
