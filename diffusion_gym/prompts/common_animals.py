"""The 45 common animals of the DDPO paper, appendix F.7: its prompts for aesthetic quality."""

from __future__ import annotations

from typing import Final

from diffusion_gym.prompts.base import PROMPTS, PromptSet
from diffusion_gym.prompts.unseen import EVERYDAY_OBJECTS, UNSEEN_ANIMALS

COMMON_ANIMALS: Final = tuple(
    """cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard beetle
    ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig turkey fly
    llama camel bat gorilla hedgehog kangaroo""".split()
)


@PROMPTS.register("common-animals")
def common_animals() -> PromptSet:
    """45 animals, the prompt being the bare name; held out are other animals and everyday objects."""
    return PromptSet(
        "common-animals",
        COMMON_ANIMALS,
        splits={"new-animals": UNSEEN_ANIMALS, "new-objects": EVERYDAY_OBJECTS},
        source="DDPO, F.7 and E.1; held-out lists from the authors' code",
    )
