"""A reward that costs nothing and has a gradient, for tests of agents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from diffusion_gym.rewards import RewardOutput


class Brightness:
    """The mean of a picture's values; `diffusion_gym.testing.brightness:Brightness` as a reward."""

    name = "brightness"
    differentiable = True

    def __call__(
        self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> RewardOutput:
        """Score `images`, float `(N, 3, H, W)` in [0, 1]."""
        return RewardOutput(images.mean((1, 2, 3)), {"red": images[:, 0].mean((1, 2))})
