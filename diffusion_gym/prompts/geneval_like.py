"""Prompts of GenEval's six categories with the metadata that the reward `GenEval` reads; not the 553 published ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from diffusion_gym.prompts.base import PROMPTS, PromptSet
from diffusion_gym.prompts.files import read_prompt_file

PATH = Path(__file__).with_name("data") / "geneval_like.jsonl"


@PROMPTS.register("geneval-like")
def geneval_like() -> PromptSet:
    """120 prompts of each category, 53 of single objects; the held-out splits are the categories, 25 prompts each."""
    source = "ours, after GenEval's categories, not its prompts (`tools/build_geneval_prompts.py`)"
    return replace(read_prompt_file(str(PATH)), name="geneval-like", source=source)
