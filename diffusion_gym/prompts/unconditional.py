"""The prompts of a model that has none: the empty one."""

from __future__ import annotations

from diffusion_gym.prompts.base import PROMPTS, PromptSet


@PROMPTS.register("unconditional")
def unconditional() -> PromptSet:
    """One empty prompt, for unconditional models."""
    return PromptSet("unconditional", ("",), source="thesis, chapter 5")
