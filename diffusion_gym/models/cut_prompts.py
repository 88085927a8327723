"""Prompts that are longer than a model's tokenizers take, which are cut without a word by all libraries."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Sequence
from typing import Any


def cut_off(tokenizer: Any, limit: int, prompts: Sequence[str]) -> dict[str, str]:
    """What a tokenizer of transformers cuts off, by prompt; those that it takes whole are left out.

    Args:
        tokenizer: the tokenizer.
        limit: tokens of a row, those of beginning and end among them.
        prompts: strings.
    """
    marks = len(tokenizer("", verbose=False).input_ids)
    # A token is a byte of the normalised text at least, or T5's mark of a beginning: most need not be looked at.
    long = [prompt for prompt in dict.fromkeys(prompts) if _most_tokens(prompt) > limit - marks]
    if not long:
        return {}
    ids = tokenizer(long, add_special_tokens=False, verbose=False).input_ids
    rest = {prompt: row[limit - marks :] for prompt, row in zip(long, ids, strict=True)}
    return {prompt: tokenizer.decode(row).strip() for prompt, row in rest.items() if row}


def warn_of_cut_prompts(model: Any, prompts: Sequence[str], name: str) -> None:
    """Say once which of a set's prompts the model sees in part only, and what it does not see.

    Two prompts that differ only there are one to the model, and two to rewards and to statistics of each prompt.

    Args:
        model: a model; one without `tokenizers` is not asked.
        prompts: the prompts.
        name: what the user calls the set, such as `prompts='dpok'`.
    """
    for tokenizer, limit in getattr(model, "tokenizers", ()):
        if cut := cut_off(tokenizer, limit, prompts):
            prompt, lost = next(iter(cut.items()))
            warnings.warn(
                f"{name}: {len(cut)} of {len(prompts)} are longer than the {limit} tokens that "
                f"{type(tokenizer).__name__} of model={model.name!r} takes, and are cut; of {_short(prompt)!r} it does "
                f"not see {_short(lost)!r}",
                stacklevel=3,
            )


def _most_tokens(prompt: str) -> int:
    return len(unicodedata.normalize("NFKC", prompt).lower().encode()) + 1


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
