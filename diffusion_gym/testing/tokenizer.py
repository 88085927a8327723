"""The embedded model's tokenizer for models with random weights: CLIP's class, without a download."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from diffusion_gym.models.shapes import WEIGHTS


def write_tokenizer(folder: Path) -> Any:
    """Write the tokenizer's files to `folder`, which may hold others, and return the `CLIPTokenizer`."""
    from transformers import CLIPTokenizer

    shutil.copytree(WEIGHTS / "tokenizer", folder, dirs_exist_ok=True)
    return CLIPTokenizer.from_pretrained(folder)
