"""`a(n) [animal] [activity]`: the DDPO paper's prompts for alignment with a vision-language model (section 2.2)."""

from __future__ import annotations

from typing import Final

from diffusion_gym.prompts.base import PROMPTS, PromptSet
from diffusion_gym.prompts.common_animals import COMMON_ANIMALS
from diffusion_gym.prompts.templates import template_set
from diffusion_gym.prompts.unseen import UNSEEN_ANIMALS

ACTIVITIES: Final = ("riding a bike", "playing chess", "washing dishes")
# The first two are in figure 6 of the paper, the third in section 6.3 of its conference version.
NEW_ACTIVITIES: Final = ("driving a car", "typing on a keyboard", "taking an exam")
NEW_ANIMALS: Final = (*UNSEEN_ANIMALS, "capybara")  # figure 6 shows a capybara, which is not among the 38


@PROMPTS.register("animal-activities")
def animal_activities() -> PromptSet:
    """The 45 common animals at three activities; held out are other animals, other activities, and both at once."""
    return template_set(
        "animal-activities",
        "a(n) {animal} {activity}",
        {"animal": COMMON_ANIMALS, "activity": ACTIVITIES},
        {
            "new-animals": {"animal": NEW_ANIMALS},
            "new-activities": {"activity": NEW_ACTIVITIES},
            "new-both": {"animal": NEW_ANIMALS, "activity": NEW_ACTIVITIES},
        },
        source="DDPO, sections 2.2 and E.1",
    )
