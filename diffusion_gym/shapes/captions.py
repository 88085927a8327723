"""The caption language of the embedded `Shapes` model: what can be said, parsed and drawn.

Four families of captions, after DPOK's four prompt categories:

| family        | example                              |
|---------------|--------------------------------------|
| `color`       | a green square                       |
| `count`       | three circles; three red circles     |
| `composition` | a red circle and a blue square       |
| `location`    | a star above a triangle              |
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

SHAPES: Final = ("circle", "square", "triangle", "star")
COLORS: Final = ("red", "green", "blue", "yellow", "purple", "cyan")
NUMBERS: Final = {"a": 1, "two": 2, "three": 3, "four": 4}
RELATIONS: Final = ("above", "below", "left of", "right of")
FAMILIES: Final = ("color", "count", "composition", "location")

_THING = rf"(?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES)})"
_ONE = re.compile(rf"^a {_THING}$")
_MANY = re.compile(rf"^(two|three|four) {_THING}s$")
_PAIR = re.compile(rf"^a {_THING} (and|{'|'.join(RELATIONS)}) a {_THING}$")


@dataclass(frozen=True)
class Thing:
    """`number` equal objects of one shape; `color` None leaves the color free."""

    shape: str
    color: str | None = None
    number: int = 1

    def __str__(self) -> str:
        article = next(word for word, value in NUMBERS.items() if value == self.number)
        plural = "s" if self.number > 1 else ""
        return " ".join(filter(None, (article, self.color, self.shape + plural)))


@dataclass(frozen=True)
class Caption:
    """One caption: one thing, or two things with an optional spatial relation between them."""

    things: tuple[Thing, ...]
    relation: str | None = None

    def __str__(self) -> str:
        return f" {self.relation or 'and'} ".join(map(str, self.things))

    @property
    def family(self) -> str:
        """The family of the caption: one of `FAMILIES`."""
        if self.relation is not None:
            return "location"
        if len(self.things) == 2:
            return "composition"
        return "count" if self.things[0].number > 1 else "color"

    @property
    def number(self) -> int:
        """How many objects the caption speaks of in all."""
        return sum(thing.number for thing in self.things)


def parse(text: str) -> Caption:
    """Read a caption; the inverse of `str(caption)`.

    Raises:
        ValueError: `text` is no sentence of this language.
    """
    words = " ".join(text.lower().split())
    if match := _ONE.match(words):
        return Caption((Thing(match[2], match[1]),))
    if match := _MANY.match(words):
        return Caption((Thing(match[3], match[2], NUMBERS[match[1]]),))
    if match := _PAIR.match(words):
        relation = None if match[3] == "and" else match[3]
        return Caption((Thing(match[2], match[1]), Thing(match[5], match[4])), relation)
    raise ValueError(
        f"prompt={text!r} is not a Shapes caption; write it like 'a green square', 'three red circles', "
        "'a red circle and a blue square' or 'a star above a triangle' "
        f"(shapes: {', '.join(SHAPES)}; colors: {', '.join(COLORS)})"
    )


def words() -> list[str]:
    """Every word of the language."""
    relations = sorted({word for relation in RELATIONS for word in relation.split()})
    return [*NUMBERS, "and", *relations, *COLORS, *SHAPES, *(shape + "s" for shape in SHAPES)]


def holds(relation: str, dx: float, dy: float) -> bool:
    """Whether the first object stands in `relation` to the second, (dx, dy) = first - second in pixels.

    The larger of the two offsets decides, so exactly one relation holds for two distinct places.
    """
    if relation in ("above", "below"):
        return abs(dy) > abs(dx) and (dy < 0) == (relation == "above")
    return abs(dx) > abs(dy) and (dx < 0) == (relation == "left of")


def all_captions(family: str) -> tuple[Caption, ...]:
    """Every caption of one family, in a fixed order.

    Pairs name two different shapes unless both colors are given and differ, so that each object of a
    true picture answers to exactly one half of the caption.
    """
    colored = [Thing(shape, color) for shape in SHAPES for color in COLORS]
    plain = [Thing(shape) for shape in SHAPES]
    if family == "color":
        return tuple(Caption((thing,)) for thing in colored)
    if family == "count":
        numbers = [n for n in NUMBERS.values() if n > 1]
        return tuple(Caption((Thing(t.shape, t.color, n),)) for n in numbers for t in plain + colored)
    colored_pairs = [(a, b) for a in colored for b in colored if a != b]
    if family == "composition":
        return tuple(Caption(pair) for pair in colored_pairs)
    if family == "location":
        pairs = [(a, b) for a in plain for b in plain if a != b] + colored_pairs
        return tuple(Caption(pair, relation) for relation in RELATIONS for pair in pairs)
    raise ValueError(f"family={family!r} is unknown; choose one of {', '.join(FAMILIES)}")
