"""Prompts from a sentence with gaps and a list of words for each gap."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Final

from diffusion_gym.prompts.base import PromptSet
from diffusion_gym.prompts.english import article, plural

Words = Mapping[str, Sequence[str]]

_MOST_PROMPTS: Final = 1_000_000


class _Word(str):
    """A word that `{name:plural}` puts in the plural."""

    __slots__ = ()

    def __format__(self, form: str) -> str:
        return plural(self) if form == "plural" else str(self)


def fill(template: str, words: Words) -> tuple[str, ...]:
    """Every sentence that a template makes, the last gap changing fastest.

    Args:
        template: a sentence with gaps, such as `a(n) {animal} {activity}` or `{number} {animal:plural}`. `a(n)`
            becomes `a` or `an`, as the next word wants.
        words: for each gap, what to put there.

    Raises:
        ValueError: a gap without words, words without a gap, or a gap that cannot be read.
    """
    gaps = _gaps(template)
    for name in gaps:
        if not words.get(name):
            raise ValueError(f"template={template!r} has no words for {{{name}}}; give a list named {name!r}")
    for name in words:
        if name not in gaps:
            raise ValueError(
                f"template={template!r} has no gap for the list {name!r}; write {{{name}}} or drop the list"
            )
    number = math.prod(len(words[name]) for name in gaps)
    if number > _MOST_PROMPTS:
        lengths = " * ".join(str(len(words[name])) for name in gaps)
        raise ValueError(
            f"template={template!r} makes {lengths} = {number} prompts, more than {_MOST_PROMPTS}; shorten the lists"
        )
    rows = itertools.product(*(words[name] for name in gaps))
    return tuple(_sentence(template, dict(zip(gaps, map(_Word, row), strict=True))) for row in rows)


def template_set(
    name: str,
    template: str,
    words: Words,
    held_out: Mapping[str, Words] | None = None,
    source: str = "",
) -> PromptSet:
    """A prompt set from a template.

    Args:
        name: what it is called.
        template: the sentence with gaps, see `fill`.
        words: for each gap, what to put there in training.
        held_out: for each held-out split, the lists that differ from the training's.
        source: where the prompts come from.

    Raises:
        ValueError: see `fill`; or a split that changes nothing or makes prompts that are trained on.
    """
    splits = {split: fill(template, {**words, **changed}) for split, changed in (held_out or {}).items()}
    return PromptSet(name, fill(template, words), splits=splits, source=source)


def _gaps(template: str) -> list[str]:
    try:
        parts = [(name, form, flag) for _, name, form, flag in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"template={template!r} cannot be read ({error}); write a gap as {{animal}}") from error
    for name, form, flag in parts:
        if not name.isidentifier() or form not in ("", "plural") or flag:
            raise ValueError(
                f"template={template!r} has a gap {name!r} that cannot be read; write {{animal}} or {{animal:plural}}"
            )
    if not parts:
        raise ValueError(f"template={template!r} has no gap; write one as {{animal}}, or give the prompts as a list")
    return list(dict.fromkeys(name for name, _, _ in parts))


def _sentence(template: str, row: Mapping[str, str]) -> str:
    def choose(match: re.Match[str]) -> str:
        return match[1] + article(match[2])[1:]

    return re.sub(r"\b([Aa])\(n\)(?= (\S+))", choose, template.format_map(row))
