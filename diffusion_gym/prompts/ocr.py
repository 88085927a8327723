"""Scenes with a text in them, for the reward `OCR`: signs, cakes, book covers; each prompt says the text in quotes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from diffusion_gym.prompts.base import PROMPTS, PromptSet
from diffusion_gym.prompts.files import read_prompt_file

PATH = Path(__file__).with_name("data") / "ocr.jsonl"


@PROMPTS.register("ocr")
def ocr() -> PromptSet:
    """40 texts in eight scenes; held out are twelve more texts, and three more scenes. The metadata have the `text`."""
    return replace(read_prompt_file(str(PATH)), name="ocr", source="ours (`tools/build_ocr_prompts.py`)")
