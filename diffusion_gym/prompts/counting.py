"""`n animals`: the prompts with which the DDPO paper shows overoptimisation (appendix E.2)."""

from __future__ import annotations

from typing import Final

from diffusion_gym.english import NUMBERS, plural
from diffusion_gym.prompts.base import PROMPTS, PromptSet, combinations
from diffusion_gym.prompts.common_animals import COMMON_ANIMALS

# The paper names neither. The authors' code (github.com/jannerm/ddpo, `llava_counting`) has 2 to 8 of these animals.
COUNTED: Final = tuple(
    """cat dog horse monkey rabbit spider bird sheep cow lion tiger bear raccoon fox wolf ant fish squirrel turtle frog
    chicken pig""".split()
)
LOWEST, HIGHEST = 2, 8


@PROMPTS.register("counting")
def counting() -> PromptSet:
    """Two to eight of 22 animals; held out are the other 23 of the common animals, and nine and ten."""
    numbers, others = NUMBERS[LOWEST : HIGHEST + 1], [animal for animal in COMMON_ANIMALS if animal not in COUNTED]
    return PromptSet(
        "counting",
        combinations(_counted, numbers, COUNTED),
        splits={
            "new-animals": combinations(_counted, numbers, others),
            "new-numbers": combinations(_counted, NUMBERS[HIGHEST + 1 :], COUNTED),
        },
        source="DDPO, E.2; numbers and animals from the authors' code",
    )


def _counted(number: str, animal: str) -> str:
    return f"{number} {plural(animal)}"
