"""Prompt sets of the `Shapes` model: one a caption family, each with a fifth of its combinations held out."""

from __future__ import annotations

from typing import Final

from diffusion_gym.prompts.base import PROMPTS, PromptSet
from diffusion_gym.shapes.captions import COLORS, FAMILIES, SHAPES, Caption, all_captions

_EVERY: Final = 5
_SOURCE: Final = "captions of the embedded model, after DPOK's categories"


def is_held_out(caption: Caption) -> bool:
    """Whether policy training leaves `caption` out; the same for both orders of a pair and all its relations."""
    colors, shapes = [None, *COLORS], list(SHAPES)
    places = [colors.index(t.color) + shapes.index(t.shape) + (t.number - 1) for t in caption.things]
    return sum(places) % _EVERY == 3


def _family_set(family: str) -> PromptSet:
    captions = all_captions(family)
    seen = tuple(str(caption) for caption in captions if not is_held_out(caption))
    unseen = tuple(str(caption) for caption in captions if is_held_out(caption))
    return PromptSet(f"shapes-{family}", seen, unseen, source=_SOURCE)


for _family in FAMILIES:
    PROMPTS.register(f"shapes-{_family}")(lambda family=_family: _family_set(family))


@PROMPTS.register("shapes-general")
def shapes_general() -> PromptSet:
    """Two objects, with or without a relation: so many prompts that an agent may learn of those held out as well."""
    parts = {family: _family_set(family) for family in ("location", "composition")}
    seen = tuple(prompt for part in parts.values() for prompt in part.prompts)
    return PromptSet(
        "shapes-general", seen, splits={name: part.held_out for name, part in parts.items()}, source=_SOURCE
    )


@PROMPTS.register("shapes-demo")
def shapes_demo() -> PromptSet:
    """Few prompts that the embedded model gets wrong more often than right, so that minutes of training show."""
    return PromptSet(
        "shapes-demo",
        (
            "a red star left of a blue circle",
            "a green square above a yellow triangle",
            "a purple circle below a cyan star",
            "a blue triangle right of a red square",
        ),
        (
            "a cyan triangle left of a purple square",
            "a yellow circle above a red star",
            "a red square below a green triangle",
            "a green star right of a blue circle",
        ),
        source=_SOURCE,
    )
