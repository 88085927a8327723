"""What a prompt set is: the distribution p(c) that the first state draws its prompt from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from diffusion_gym.registry import Registry


@dataclass(frozen=True)
class PromptSet:
    """A finite set of prompts, drawn from uniformly.

    Attributes:
        name: what it is called.
        prompts: the prompts to train on.
        held_out: prompts of the same kind that training never sees, to measure generalisation.
    """

    name: str
    prompts: tuple[str, ...]
    held_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError(f"prompts={self.name!r} is empty; give at least one prompt")
        for prompt in (*self.prompts, *self.held_out):
            if not isinstance(prompt, str):
                raise ValueError(f"prompts={self.name!r} holds {prompt!r}, which is no string")

    def draw(self, rng: np.random.Generator) -> str:
        """One prompt, uniformly."""
        return self.prompts[rng.integers(len(self.prompts))]

    def held_out_set(self) -> PromptSet:
        """The held-out prompts as a set of their own, named `<name>/held-out`.

        Raises:
            ValueError: there are none.
        """
        if not self.held_out:
            raise ValueError(f"prompts={self.name!r} has no held-out prompts")
        return PromptSet(f"{self.name}/held-out", self.held_out)


PROMPTS: Registry[Callable[[], PromptSet]] = Registry("prompts")
