"""Sheets of pairs of pictures."""

import math

import numpy as np
import pytest
import torch

from diffusion_gym.agents.training.pictures import compared_sheet, sheet_pairs


@pytest.mark.parametrize(("side", "shown"), [(32, 96), (64, 64), (512, 128)])
def test_the_sheet_has_every_pair(side, shown):
    colors = (255, 0, 0), (0, 0, 255)
    red, blue = (torch.tensor(color, dtype=torch.uint8).expand(5, side, side, 3) for color in colors)
    prompts = ["a red circle", "x" * 200, "", "两颗星 ☆", "line\nbreak"]
    image = compared_sheet(red, blue, [0.0, 1, 2, 3, math.nan], [1.0, 0, 2, 4, 1], prompts)
    for pair in sheet_pairs(image, red[0], 5):
        assert [part.getcolors() for part in pair] == [[(shown * shown, color)] for color in colors]
    with pytest.raises(ValueError, match="is no sheet of 9 pairs"):
        sheet_pairs(image, red[0], 9)
    sheet = np.asarray(image)
    for color in colors:
        assert (sheet == color).all(-1).sum() == 5 * shown * shown
    rows, columns = (np.unique(where) for where in np.nonzero((sheet == (255, 0, 0)).all(-1)))
    assert len(rows) == 2 * shown and len(columns) == 4 * shown  # four pairs beside each other, the fifth below
    ink = (sheet != 255).any(-1)
    assert not ink[:, :8].any() and not ink[:, -2:].any()  # the long prompt is cut off
