"""Prompt sets: one file each, found by name in `PROMPTS`; a new file in this folder is found by itself."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path

from diffusion_gym.prompts.base import PROMPTS, PromptSet

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def make_prompts(prompts: str | Sequence[str] | PromptSet) -> PromptSet:
    """Build a prompt set.

    Args:
        prompts: a name in `PROMPTS`, `<name>/held-out` for its held-out split, a `.txt` file with a prompt a line,
            a list of prompts, or a `PromptSet`.

    Raises:
        ValueError: an unknown name, or an empty set.
        FileNotFoundError: the file is not there.
    """
    if isinstance(prompts, PromptSet):
        return prompts
    if not isinstance(prompts, str | Sequence):
        raise ValueError(f"prompts={prompts!r} must be a name, a .txt file, a list of strings or a PromptSet")
    if not isinstance(prompts, str):
        return PromptSet("custom", tuple(prompts))
    if prompts.endswith(".txt"):
        if not Path(prompts).is_file():
            raise FileNotFoundError(f"prompts={prompts!r} is no file; write one prompt a line")
        lines = Path(prompts).read_text(encoding="utf-8").splitlines()
        return PromptSet(prompts, tuple(line.strip() for line in lines if line.strip()))
    name, _, split = prompts.partition("/")
    if split not in ("", "held-out"):
        raise ValueError(f"prompts={prompts!r} names the split {split!r}; the only one is {name + '/held-out'!r}")
    chosen = PROMPTS[name]()
    return chosen.held_out_set() if split else chosen


__all__ = ["PROMPTS", "PromptSet", "make_prompts"]
