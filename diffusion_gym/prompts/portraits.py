"""Prompts for people's faces, for the age rewards on a prompted model; the thesis has unconditional faces instead."""

from __future__ import annotations

from diffusion_gym.prompts.base import PROMPTS, PromptSet


@PROMPTS.register("portraits")
def portraits() -> PromptSet:
    """Six plain portraits."""
    kinds = ("portrait photo", "close-up photo of the face")
    people = ("a person", "a woman", "a man")
    prompts = tuple(f"a {kind} of {who}" for kind in kinds for who in people)
    return PromptSet("portraits", prompts, source="ours")
