"""What the authors of DDPO measured generalisation on: animals and things that training never names.

Appendix E.1 shows such prompts; the conference version (ICLR 2024, figure 12) counts 38 animals and 50 objects, and the
authors' code (github.com/kvablack/ddpo-pytorch, `uncommon_animals.txt` and `everyday_objects.txt`) lists them.
"""

from __future__ import annotations

from typing import Final


def _lines(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.replace("\n", ",").split(",") if name.strip())


UNSEEN_ANIMALS: Final = _lines(
    """elephant, giraffe, hippopotamus, rhinoceros, ostrich, penguin, seal, otter, walrus, chimpanzee, orangutan, koala
    platypus, crocodile, alligator, Komodo dragon, anaconda, octopus, squid, lobster, crab, jellyfish, starfish
    seahorse, pelican, flamingo, toucan, parrot, peacock, skunk, badger, porcupine, armadillo, sloth, beaver, moose
    reindeer, shoebill stork"""
)

EVERYDAY_OBJECTS: Final = _lines(
    """toaster, chair, car, coffee cup, refrigerator, lamp, television, sofa, computer, smartphone, bicycle, table
    bookshelf, clock, microwave, blender, vacuum cleaner, iron, washing machine, dryer, oven, dishwasher, mirror
    picture frame, trash can, plant pot, water bottle, backpack, umbrella, sunglasses, wallet, keychain, pen, pencil
    notebook, stapler, scissors, tape dispenser, calculator, eraser, ruler, glue stick, highlighter, marker
    Post-it notes, envelope, stamp, key, skull, flower"""
)
