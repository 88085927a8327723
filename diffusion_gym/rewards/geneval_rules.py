"""GenEval's rules: do the objects found in a picture answer to a prompt's metadata?

As in the authors' `evaluation/evaluate_images.py` (Ghosh et al. 2023, arXiv:2310.11513), whose metadata are taken as
they are. Only Python: no network, no picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import ConfigDict, Field, Strict

from diffusion_gym.registry import unknown_name
from diffusion_gym.schemas import Count, Positive, Schema, checked

COLORS: Final = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
CATEGORIES: Final = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
Relation = Literal["left of", "right of", "above", "below"]

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # of a detection's confidence; the latter for prompts that count
MOST: Final = 16  # objects of a class, the most confident ones
SLACK: Final = 0.1  # of two objects' sizes, which their distance must exceed before one is left of the other
# What detectors and GenEval's metadata call the classes of COCO that have two names.
_SYNONYMS: Final = {
    "computer mouse": "mouse",
    "tv remote": "remote",
    "computer keyboard": "keyboard",
    "aeroplane": "airplane",
    "motorbike": "motorcycle",
    "sofa": "couch",
    "tvmonitor": "tv",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
}


class Wanted(Schema):
    """Objects that a picture should show: a clause of `include`."""

    name: Annotated[str, Field(alias="class")]
    count: Positive
    color: Literal[COLORS] | None = None  # type: ignore[valid-type]
    position: Annotated[tuple[Relation, Count], Strict(False)] | None = None
    """Where they should be to the objects of which earlier clause."""


class Unwanted(Schema):
    """Objects of which a picture should show fewer: a clause of `exclude`."""

    name: Annotated[str, Field(alias="class")]
    count: Positive


class Task(Schema):
    """What a picture should show; further keys of the metadata say nothing here."""

    model_config = ConfigDict(extra="ignore")
    include: Annotated[list[Wanted], Field(min_length=1)]
    exclude: list[Unwanted] = []
    tag: str | None = None

    @property
    def threshold(self) -> float:
        """The confidence that a detection must exceed."""
        return COUNTING_THRESHOLD if self.tag == "counting" else THRESHOLD


@dataclass(frozen=True, eq=False)
class Detected:
    """An object in a picture.

    Attributes:
        name: its class.
        score: the detector's confidence, 0 to 1.
        box: left, top, right and bottom in pixels.
        mask: its pixels, bool `(H, W)`; None where the detector gives boxes only.
    """

    name: str
    score: float
    box: tuple[float, float, float, float]
    mask: Any = None


@dataclass(frozen=True)
class Verdict:
    """What of a task holds: `held` of `asked` conditions."""

    held: int
    asked: int

    @property
    def correct(self) -> bool:
        """Whether all hold."""
        return self.held == self.asked


ColorsOf = Callable[[str, Sequence[Detected]], Sequence[str]]
"""The colours, out of `COLORS`, of objects of a class."""


def canonical(name: str) -> str:
    """A class under the name that is used here."""
    return _SYNONYMS.get(name, name)


def read_task(prompt: str, metadata: Mapping[str, Any], classes: Sequence[str]) -> Task:
    """The task in a prompt's metadata.

    Args:
        prompt: for errors.
        metadata: `include`, and maybe `exclude` and `tag`, as in GenEval's `evaluation_metadata.jsonl`.
        classes: those that the detector knows.

    Raises:
        ValueError: they are not such, name an unknown class, or a position to a clause that does not come before.
    """
    remedy = "give GenEval's metadata, such as prompts='geneval-like' has"
    task = checked(Task, dict(metadata), f"the metadata of prompt={prompt!r}", remedy)
    clauses: list[Wanted | Unwanted] = [*task.include, *task.exclude]
    for number, clause in enumerate(clauses):
        if canonical(clause.name) not in classes:
            raise ValueError(f"prompt={prompt!r}: {unknown_name('class', clause.name, list(classes))}")
        position = clause.position if isinstance(clause, Wanted) else None
        if position is not None and position[1] >= number:
            raise ValueError(
                f"prompt={prompt!r}: position={list(position)} of include[{number}] must name an earlier clause, "
                f"counted from 0"
            )
    return task


def kept(detections: Iterable[Detected], threshold: float) -> dict[str, list[Detected]]:
    """Those with a confidence above `threshold` by class, the most confident first, at most `MOST` of a class."""
    found: dict[str, list[Detected]] = {}
    for detected in sorted(detections, key=lambda one: -one.score):
        if detected.score > threshold and len(same := found.setdefault(canonical(detected.name), [])) < MOST:
            same.append(detected)
    return {name: objects for name, objects in found.items() if objects}


def relations(first: Detected, second: Detected) -> set[Relation]:
    """Where `first` is to `second`, by their boxes; two relations for a diagonal, none where they are too close."""
    offset, beyond = [], []
    for low, high in ((0, 2), (1, 3)):
        (a, b), (c, d) = ((one.box[low], one.box[high]) for one in (first, second))
        distance = (a + b - c - d) / 2
        offset.append(distance)
        beyond.append(math.copysign(max(abs(distance) - SLACK * (abs(b - a) + abs(d - c)), 0.0), distance))
    if all(abs(part) < 1e-3 for part in beyond):
        return set()
    across, down = (part / math.hypot(*offset) for part in beyond)
    named: list[tuple[Relation, bool]] = [
        ("left of", across < -0.5),
        ("right of", across > 0.5),
        ("above", down < -0.5),
        ("below", down > 0.5),
    ]
    return {name for name, holds in named if holds}


def judge(task: Task, objects: Mapping[str, Sequence[Detected]], colors_of: ColorsOf) -> Verdict:
    """What of a task holds in a picture.

    Of each class the most confident objects count, as many as are asked for. A clause asks for its number, its colour
    and its position; the colour cannot hold without the number, nor the position without both.

    Args:
        task: what is asked for.
        objects: what the picture shows, see `kept`.
        colors_of: asked only where a colour decides.
    """
    held = asked = 0
    matched: list[Sequence[Detected] | None] = []
    for clause in task.include:
        name = canonical(clause.name)
        found = list(objects.get(name, ()))[: clause.count]
        conditions = [len(found) == clause.count]
        if clause.color is not None:
            conditions.append(conditions[0] and list(colors_of(name, found)).count(clause.color) >= clause.count)
        if clause.position is not None:
            relation, number = clause.position
            others = matched[number]
            placed = others is not None and all(relation in relations(a, b) for a in found for b in others)
            conditions.append(all(conditions) and placed)
        matched.append(found if all(conditions) else None)
        held, asked = held + sum(conditions), asked + len(conditions)
    for limit in task.exclude:
        held, asked = held + (len(objects.get(canonical(limit.name), ())) < limit.count), asked + 1
    return Verdict(held, asked)
