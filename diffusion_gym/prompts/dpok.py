"""The prompts of DPOK (arXiv:2305.16381): four single ones, and their four categories as sets.

The four are those of figure 2; the full stop is that of the authors' code (google-research/dpok), where
`A green colored rabbit.` is the default. The paper trains one model a prompt. Of its categories (color, count,
composition, location) it publishes no lists: the sets here say the sentence of figure 2 with other words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from diffusion_gym.english import article, plural
from diffusion_gym.prompts.base import PROMPTS, PromptSet, combinations

# The prompt, and prompts of the same kind that differ in a word or two; some are test prompts of the authors' code.
SINGLE: Final[Mapping[str, tuple[str, Mapping[str, tuple[str, ...]]]]] = {
    "green-rabbit": (
        "A green colored rabbit.",
        {
            "new-animals": ("A green colored cat.", "A green colored dog."),
            "new-colors": ("A blue colored rabbit.", "A red colored rabbit."),
        },
    ),
    "cat-and-dog": (
        "A cat and a dog.",
        {
            "new-animals": ("A cat and a rabbit.", "A horse and a dog."),
            "new-order": ("A dog and a cat.",),
        },
    ),
    "four-wolves": (
        "Four wolves in the park.",
        {
            "new-animals": ("Four birds in the park.", "Four dogs in the park."),
            "new-numbers": ("Two wolves in the park.", "Three wolves in the park."),
        },
    ),
    "dog-on-the-moon": (
        "A dog on the moon.",
        {
            "new-animals": ("A lion on the moon.", "A cat on the moon."),
            "new-places": ("A dog in the desert.", "A dog on a mountain."),
        },
    ),
}
_ANIMALS: Final = ("rabbit", "cat", "dog", "wolf", "bird", "horse", "sheep", "bear")
_NEW_ANIMALS: Final = ("lion", "elephant", "fox", "mouse")
_OWN: Final = "the sentence of DPOK, figure 2, with words of our own"


def _single(name: str) -> PromptSet:
    prompt, splits = SINGLE[name]
    return PromptSet(f"dpok-{name}", (prompt,), splits=splits, source="DPOK, figure 2; held-out prompts are ours")


for _name in SINGLE:
    PROMPTS.register(f"dpok-{_name}")(lambda name=_name: _single(name))


@PROMPTS.register("dpok")
def dpok() -> PromptSet:
    """The four prompts together, as the DDPO authors compare with DPOK."""
    splits: dict[str, tuple[str, ...]] = {}
    for _, parts in SINGLE.values():
        for split, prompts in parts.items():
            splits[split] = (*splits.get(split, ()), *prompts)
    prompts = tuple(prompt for prompt, _ in SINGLE.values())
    return PromptSet("dpok", prompts, splits=splits, source="DPOK, figure 2; held-out prompts are ours")


@PROMPTS.register("dpok-color")
def dpok_color() -> PromptSet:
    """An animal in a color that it does not have."""

    def say(color: str, animal: str) -> str:
        return f"{_a(color)} colored {animal}."

    colors = ("green", "blue", "red", "purple", "orange", "pink")
    splits = {
        "new-animals": combinations(say, colors, _NEW_ANIMALS),
        "new-colors": combinations(say, ("yellow", "turquoise"), _ANIMALS),
    }
    return PromptSet("dpok-color", combinations(say, colors, _ANIMALS), splits=splits, source=_OWN)


@PROMPTS.register("dpok-count")
def dpok_count() -> PromptSet:
    """Two to five animals in the park."""

    def say(number: str, animal: str) -> str:
        return f"{number} {plural(animal)} in the park."

    numbers = ("Two", "Three", "Four", "Five")
    splits = {
        "new-animals": combinations(say, numbers, _NEW_ANIMALS),
        "new-numbers": combinations(say, ("Six", "Seven"), _ANIMALS),
    }
    return PromptSet("dpok-count", combinations(say, numbers, _ANIMALS), splits=splits, source=_OWN)


@PROMPTS.register("dpok-composition")
def dpok_composition() -> PromptSet:
    """Two different animals, in both orders; new-animals pairs one of them with an animal that training never names."""

    def pairs(first: tuple[str, ...], second: tuple[str, ...]) -> tuple[str, ...]:
        different = ((one, other) for one in first for other in second if one != other)
        return tuple(f"{_a(one)} and {article(other)} {other}." for one, other in different)

    splits = {"new-animals": pairs(_ANIMALS, _NEW_ANIMALS), "new-pairs": pairs(_NEW_ANIMALS, _NEW_ANIMALS)}
    return PromptSet("dpok-composition", pairs(_ANIMALS, _ANIMALS), splits=splits, source=_OWN)


@PROMPTS.register("dpok-location")
def dpok_location() -> PromptSet:
    """An animal in a place where it does not belong."""

    def say(animal: str, place: str) -> str:
        return f"{_a(animal)} {place}."

    places = ("on the moon", "in the desert", "on a boat", "on the beach")
    splits = {
        "new-animals": combinations(say, _NEW_ANIMALS, places),
        "new-places": combinations(say, _ANIMALS, ("on a mountain", "under the sea")),
    }
    return PromptSet("dpok-location", combinations(say, _ANIMALS, places), splits=splits, source=_OWN)


def _a(word: str) -> str:
    return f"{article(word).capitalize()} {word}"
