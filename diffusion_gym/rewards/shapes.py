"""The rewards of the `Shapes` model: whether, or how far, the picture shows what its caption says.

DPOK's four prompt categories (color, count, composition, location), judged by a detector instead of a learned reward.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from diffusion_gym.images import to_uint8
from diffusion_gym.rewards.base import REWARDS, RewardOutput
from diffusion_gym.rewards.shapes_detector import Detected, detect
from diffusion_gym.shapes.captions import FAMILIES, Caption, Thing, holds, parse
from diffusion_gym.shapes.scenes import SIZE


class ShapesReward:
    """Scores pictures of shapes by the facts of their captions.

    Every family's reward scores any caption of the language in the same way; the family names the reward and the
    prompts that it is meant for.

    Args:
        family: one of `FAMILIES`.
        strict: score 1 if all facts hold and else 0, in place of the share of facts that hold.
    """

    def __init__(self, family: str, *, strict: bool = False) -> None:
        self.family = family
        self.name = family.capitalize()
        self.strict = strict

    def __call__(
        self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> RewardOutput:
        """Score `images`, float `(N, 3, S, S)` in [0, 1] with S a multiple of 32.

        Returns:
            Scores in [0, 1] and, whatever `strict` is, both `success` and `graded` in `info`; float32 `(N,)` each.

        Raises:
            ValueError: a prompt is no Shapes caption, or the images' size does not suit.
        """
        captions = [parse(prompt) for prompt in prompts]
        pictures = detect(to_uint8(images).cpu().numpy())
        answers = [facts(caption, objects) for caption, objects in zip(captions, pictures, strict=True)]
        graded = torch.tensor([sum(held) / len(held) for held in answers], dtype=torch.float32, device=images.device)
        success = torch.tensor([all(held) for held in answers], dtype=torch.float32, device=images.device)
        return RewardOutput(success if self.strict else graded, {"success": success, "graded": graded})

    @staticmethod
    def check_size(height: int, width: int) -> None:
        """Refuse pictures that the detector cannot read."""
        if height != width or height % SIZE:
            raise ValueError(f"it reads squares of a multiple of {SIZE} pixels; leave height and width at {SIZE}")


for _family in FAMILIES:
    REWARDS.register(_family.capitalize(), needs=("shapes",), prompts=f"shapes-{_family}")(
        partial(ShapesReward, _family)
    )


def facts(caption: Caption, objects: Sequence[Detected]) -> list[bool]:
    """Which facts of `caption` hold in a picture with `objects`; all of them exactly if the caption is true.

    - There are as many objects as the caption names.
    - The k-th object named with some shape, color, or shape and color, finds at least k objects of that kind. This
      gives partial credit on the way to "four stars", and keeps one circle from being both halves of a pair.
    - For a relation: it holds between an object like the first thing and another like the second.
    """
    named = [thing for thing in caption.things for _ in range(thing.number)]
    present = Counter(kind for item in objects for kind in _kinds(item))
    asked: Counter[tuple[str | None, str | None]] = Counter()
    held = [len(objects) == len(named)]
    for thing in named:
        for kind in _kinds(thing):
            asked[kind] += 1
            held.append(present[kind] >= asked[kind])
    if caption.relation is not None:
        first, second = caption.things
        pairs = [(a, b) for a, b in itertools.permutations(objects, 2) if _like(a, first) and _like(b, second)]
        held.append(any(holds(caption.relation, a.x - b.x, a.y - b.y) for a, b in pairs))
    return held


def _kinds(item: Thing | Detected) -> set[tuple[str | None, str | None]]:
    """The (shape, color) kinds that `item` belongs to, None standing for any; what is unknown makes no kind."""
    return {(item.shape, None), (None, item.color), (item.shape, item.color)} - {(None, None)}


def _like(item: Detected, thing: Thing) -> bool:
    return item.shape == thing.shape and thing.color in (None, item.color)
