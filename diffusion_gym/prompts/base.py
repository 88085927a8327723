"""What a prompt set is: the distribution p(c) that the first state draws its prompt from."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from diffusion_gym.registry import Registry

HELD_OUT: Final = "held-out"  # the split of all held-out prompts


@dataclass(frozen=True)
class PromptSet:
    """A finite set of prompts, drawn from uniformly.

    Attributes:
        name: what it is called.
        prompts: the prompts to train on.
        held_out: prompts of the same kind that training never sees, to measure generalisation; all splits together.
        splits: the held-out prompts by what is new in them, such as `new-animals`; may be empty. Where splits are
            given, `held_out` may be left out.
        source: where the prompts come from.
        metadata: what the reward is told of a prompt besides its text, trained on or held out; may lack prompts.

    Raises:
        ValueError: no prompts, something that is no string, a held-out prompt that is trained on, or splits that are
            not the held-out prompts; metadata of no prompt, or that is no mapping.
    """

    name: str
    prompts: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    splits: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    source: str = ""
    metadata: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError(f"prompts={self.name!r} is empty; give at least one prompt")
        union = tuple(dict.fromkeys(prompt for part in self.splits.values() for prompt in part))
        if self.splits and not self.held_out:
            object.__setattr__(self, "held_out", union)
        for prompt in (*self.prompts, *self.held_out):
            if not isinstance(prompt, str):
                raise ValueError(f"prompts={self.name!r} holds {prompt!r}, which is no string")
        if self.splits and set(union) != set(self.held_out):
            raise ValueError(f"prompts={self.name!r}: splits must hold just the held-out prompts; leave held_out out")
        if HELD_OUT in self.splits:
            raise ValueError(f"prompts={self.name!r}: {HELD_OUT!r} means all held-out prompts; rename the split")
        empty = [name for name, part in self.splits.items() if not part]
        if empty:
            raise ValueError(f"prompts={self.name!r}: the split {empty[0]!r} is empty; leave it out")
        both = set(self.prompts).intersection(self.held_out)
        if both:
            raise ValueError(
                f"prompts={self.name!r} trains on the held-out prompt {min(both)!r}; take it out of one of the two"
            )
        strange = set(self.metadata).difference(self.prompts, self.held_out)
        if strange:
            raise ValueError(f"prompts={self.name!r} has metadata of {min(strange)!r}, which is none of its prompts")
        for prompt, entry in self.metadata.items():
            if not isinstance(entry, Mapping) or not all(isinstance(key, str) for key in entry):
                raise ValueError(
                    f"prompts={self.name!r}: the metadata {entry!r} of {prompt!r} must be a mapping with string keys"
                )

    def draw(self, rng: np.random.Generator) -> str:
        """One prompt, uniformly."""
        return self.prompts[rng.integers(len(self.prompts))]

    def metadata_of(self, prompts: Sequence[str]) -> list[dict[str, Any]]:
        """What the reward is told of each prompt besides its text; nothing of one that is not in the set."""
        return [copy.deepcopy(dict(self.metadata.get(prompt, {}))) for prompt in prompts]

    def held_out_set(self) -> PromptSet:
        """The held-out prompts as a set of their own, named `<name>/held-out`.

        Raises:
            ValueError: there are none.
        """
        return self.split(HELD_OUT)

    def split(self, split: str) -> PromptSet:
        """One held-out split as a set of its own, named `<name>/<split>`; `held-out` is all of them.

        Raises:
            ValueError: there is no such split.
        """
        if not self.held_out:
            raise ValueError(f"prompts={self.name!r} has no held-out prompts")
        parts = {HELD_OUT: self.held_out, **self.splits}
        if split not in parts:
            raise ValueError(f"prompts={self.name!r} has no split {split!r}; choose one of {', '.join(parts)}")
        told = {prompt: self.metadata[prompt] for prompt in parts[split] if prompt in self.metadata}
        return PromptSet(f"{self.name}/{split}", parts[split], source=self.source, metadata=told)


def combinations(sentence: Callable[..., str], *words: Sequence[str]) -> tuple[str, ...]:
    """What `sentence` makes of every combination of the words, those of the last list changing fastest."""
    return tuple(itertools.starmap(sentence, itertools.product(*words)))


PROMPTS: Registry[Callable[[], PromptSet]] = Registry("prompts")
