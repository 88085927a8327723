"""Prompt sets: one file each, found by name in `PROMPTS`; a new file in this folder is found by itself."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path

from diffusion_gym.prompts.base import PROMPTS, PromptSet
from diffusion_gym.prompts.files import is_prompt_file, read_prompt_file

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith(("_", "build_")):  # those are run as scripts
        importlib.import_module(f"{__name__}.{_module.name}")


def make_prompts(prompts: str | Sequence[str] | PromptSet) -> PromptSet:
    """Build a prompt set.

    Args:
        prompts: a name in `PROMPTS`; `<name>/held-out` for its held-out prompts or `<name>/<split>` for some of them;
            a file (.txt, .json, .jsonl, .csv, .tsv), `<file>#<category or split>` for a part of it; a list of
            prompts; or a `PromptSet`.

    Raises:
        ValueError: an unknown name or split, a file that cannot be read, or an empty set.
        FileNotFoundError: the file is not there.
    """
    if isinstance(prompts, PromptSet):
        return prompts
    if not isinstance(prompts, str | Sequence):
        raise ValueError(f"prompts={prompts!r} must be a name, a prompt file, a list of strings or a PromptSet")
    if not isinstance(prompts, str):
        return PromptSet("custom", tuple(prompts))
    if is_prompt_file(prompts):
        return read_prompt_file(prompts)
    if Path(prompts).is_file():
        raise ValueError(f"prompts={prompts!r} is a file of another kind; name it .txt, .json, .jsonl, .csv or .tsv")
    name, _, split = prompts.partition("/")
    chosen = PROMPTS[name]()
    return chosen.split(split) if split else chosen


def names_prompt_set(text: str) -> bool:
    """Whether `text` names a set or a file for `make_prompts`; else it is a prompt itself."""
    return text.partition("/")[0] in PROMPTS or is_prompt_file(text)


__all__ = ["PROMPTS", "PromptSet", "make_prompts", "names_prompt_set"]
