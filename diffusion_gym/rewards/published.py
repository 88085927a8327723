"""Published weights in networks of transformers: their names, and what no file holds."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch


def renamed(name: str, renames: Iterable[tuple[str, str]]) -> str:
    """The name of a weight after all replacements `(pattern, text)`, in turn."""
    for pattern, text in renames:
        name = re.sub(pattern, text, name)
    return name


def number_positions(embeddings: Any, number: int) -> None:
    """Put in `position_ids`: a buffer that is computed and not stored, so without values where weights were read."""
    embeddings.register_buffer("position_ids", torch.arange(number)[None], persistent=False)


def not_those_of(what: str, error: Exception) -> ValueError:
    """The error of weights that do not fit a network; `what` begins the sentence."""
    return ValueError(f"{what} ({' '.join(str(error).splitlines())[:200]})")
