"""The 398 animals of ImageNet: the DDPO paper's prompts for compressibility and incompressibility (section 2.1)."""

from __future__ import annotations

from pathlib import Path

from diffusion_gym.prompts.base import PROMPTS, PromptSet

PATH = Path(__file__).with_name("data") / "imagenet_animals.txt"


@PROMPTS.register("imagenet-animals")
def imagenet_animals() -> PromptSet:
    """The first name of each of the first 398 classes, which are the animals, the prompt being the bare name."""
    return PromptSet(
        "imagenet-animals",
        tuple(PATH.read_text(encoding="utf-8").splitlines()),
        source="DDPO, section 2.1; names from timm (`prompts/data/README.md`)",
    )
