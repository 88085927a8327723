"""`a(n) [animal] [activity]`: the DDPO paper's prompts for alignment with a vision-language model (section 2.2)."""

from __future__ import annotations

from typing import Final

from diffusion_gym.english import article
from diffusion_gym.prompts.base import PROMPTS, PromptSet, combinations
from diffusion_gym.prompts.common_animals import COMMON_ANIMALS
from diffusion_gym.prompts.unseen import UNSEEN_ANIMALS

ACTIVITIES: Final = ("riding a bike", "playing chess", "washing dishes")
# The first two are in figure 6 of the paper, the third in section 6.3 of its conference version.
NEW_ACTIVITIES: Final = ("driving a car", "typing on a keyboard", "taking an exam")
NEW_ANIMALS: Final = (*UNSEEN_ANIMALS, "capybara")  # figure 6 shows a capybara, which is not among the 38


@PROMPTS.register("animal-activities")
def animal_activities() -> PromptSet:
    """The 45 common animals at three activities; held out are other animals, other activities, and both at once."""
    return PromptSet(
        "animal-activities",
        combinations(_acting, COMMON_ANIMALS, ACTIVITIES),
        splits={
            "new-animals": combinations(_acting, NEW_ANIMALS, ACTIVITIES),
            "new-activities": combinations(_acting, COMMON_ANIMALS, NEW_ACTIVITIES),
            "new-both": combinations(_acting, NEW_ANIMALS, NEW_ACTIVITIES),
        },
        source="DDPO, sections 2.2 and E.1",
    )


def _acting(animal: str, activity: str) -> str:
    return f"{article(animal)} {animal} {activity}"
