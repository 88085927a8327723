"""The training set of the `Shapes` model: captions drawn by family, and one true picture of each."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from diffusion_gym.shapes.captions import FAMILIES, Caption, all_captions
from diffusion_gym.shapes.scenes import SIZE, render

# Relations are the hardest to learn, so they get the most captions.
SHARES: Final = {"color": 0.1, "count": 0.2, "composition": 0.2, "location": 0.5}


def draw_captions(number: int, rng: np.random.Generator) -> list[Caption]:
    """`number` captions: the family by `SHARES`, then any of its captions with equal chance."""
    captions = {family: all_captions(family) for family in FAMILIES}
    families = rng.choice(list(SHARES), size=number, p=list(SHARES.values()))
    return [captions[family][rng.integers(len(captions[family]))] for family in families]


def make_pictures(number: int, seed: int) -> tuple[list[Caption], NDArray[np.uint8]]:
    """Captions and their pictures, uint8 (number, 32, 32, 3); the same for the same seed."""
    rng = np.random.default_rng(seed)
    captions = draw_captions(number, rng)
    pictures = np.empty((number, SIZE, SIZE, 3), np.uint8)
    for index, caption in enumerate(tqdm(captions, desc="drawing", mininterval=5)):
        pictures[index] = render(caption, rng)
    return captions, pictures
