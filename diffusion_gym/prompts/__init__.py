"""Prompt sets: one file each, found by name in `PROMPTS`; a new file in this folder is found by itself."""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_gym.prompts.base import PROMPTS, PromptSet
from diffusion_gym.prompts.files import names_prompt_file, prompt_list, read_prompt_file
from diffusion_gym.registry import closest_name

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith(("_", "build_")):  # those are run as scripts
        importlib.import_module(f"{__name__}.{_module.name}")


def make_prompts(prompts: str | Sequence[str | Mapping[str, Any]] | PromptSet) -> PromptSet:
    """Build a prompt set.

    Args:
        prompts: a name in `PROMPTS` or a file (.txt, .jsonl), with `/held-out` for its held-out prompts or `/<split>`
            for some of them; a list of prompts, or of objects as in a .jsonl file; or a `PromptSet`.

    Raises:
        ValueError: an unknown name or split, a file that cannot be read, or an empty set.
        FileNotFoundError: the file is not there.
    """
    if isinstance(prompts, PromptSet):
        return prompts
    if not isinstance(prompts, str | Sequence):
        raise ValueError(f"prompts={prompts!r} must be a name, a prompt file, a list of strings or a PromptSet")
    if not isinstance(prompts, str):
        # A plain word, such as "portraits", may be a caption.
        if len(prompts) == 1 and "-" in str(prompts[0]) and _set_and_split(str(prompts[0]))[0] in PROMPTS:
            raise ValueError(f"prompts={list(prompts)!r} is a list with a set's name; write prompts={prompts[0]!r}")
        return prompt_list(prompts)
    if names_prompt_file(prompts):
        return read_prompt_file(prompts)
    name, mark, split = _set_and_split(prompts)
    if name not in PROMPTS:
        _check_no_path(prompts)
    chosen = PROMPTS[name]()
    if mark == "#":
        raise ValueError(f"prompts={prompts!r}: a part of a set stands after a /; write {name + '/' + split!r}")
    return chosen.split(split) if split else chosen


def _set_and_split(text: str) -> tuple[str, str, str]:
    """`set/split` in its parts; also with a #, which people write."""
    return text.partition("#") if "/" not in text.partition("#")[0] else text.partition("/")


def _check_no_path(text: str) -> None:
    """Refuse what is no set but a path, before it is called an unknown set."""
    if Path(text).is_dir():
        raise ValueError(f"prompts={text!r} is a directory; name a prompt file in it")
    if Path(text).is_file():
        raise ValueError(f"prompts={text!r} is a file of another kind; name it .txt or .jsonl")


def names_prompt_set(text: str) -> bool:
    """Whether `text` names a set or a file for `make_prompts`, if only by a path it refuses; else it is a prompt."""
    if _set_and_split(text)[0] in PROMPTS or names_prompt_file(text):
        return True
    return ("/" in text or "." in text) and os.path.exists(text)  # Path.exists would raise for a long prompt


def prompts_of_words(words: Sequence[str]) -> str | list[str]:
    """What the words of a command line mean to `make_prompts`: one name of a set or file, or prompts.

    Args:
        words: one name, or one or more prompts.

    Raises:
        ValueError: a set or file among several words, or one word that is nearly the name of a set. A plain word, such
            as "mountain", must be nearer to a name ("counting") than one that is spelt like a name, with - or _ or /.
    """
    for word in words:
        if len(words) > 1 and names_prompt_set(word):
            raise ValueError(
                f"prompts={' '.join(words)!r} has the set or file {word!r} among {len(words)} words; give one set or "
                "file by itself, or write all the prompts into one .txt file"
            )
    if len(words) != 1 or names_prompt_set(words[0]):
        return words[0] if len(words) == 1 else list(words)
    word = words[0]
    like_a_name = any(mark in word for mark in "-_/#")
    meant = closest_name(_set_and_split(word)[0], PROMPTS.names(), cutoff=0.6 if like_a_name else 0.8)
    if meant and " " not in word.strip():
        raise ValueError(
            f"prompts={word!r} is no prompt set; did you mean {meant!r}? To train on the word itself, write it into a "
            f".txt file; known sets: {', '.join(PROMPTS)}"
        )
    return [word]


__all__ = ["PROMPTS", "PromptSet", "make_prompts", "names_prompt_set", "prompts_of_words"]
