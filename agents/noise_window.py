"""Where the window of noisy steps is in an iteration of training: fixed, drawn anew, or sliding.

A policy gradient needs noise only in the steps that it trains on. MixGRPO (arXiv:2507.21802) slides a window of four
over the trajectory, Flow-GRPO-Fast draws a place for one of two or three; the other steps are deterministic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from diffusion_gym.agents.finite import Options, require, require_choice
from diffusion_gym.agents.streams import stream

Place = Literal["fixed", "random", "sliding"]


@dataclass(frozen=True)
class NoiseWindowOptions(Options):
    """Where the environment's `noisy_steps` are while an agent trains; evaluation has them where they are."""

    noise_window: Place = "fixed"
    """Where the window of noisy steps is: as `noisy_steps` of the environment says; at a `random` place in each
    iteration; or `sliding` from there to the end of trained_steps, and again. Its length stays."""
    window_every: int = 25
    """Iterations between two moves of a sliding window."""
    window_stride: int = 1
    """Steps by which a sliding window moves."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self, "noise_window", Place)
        require(self, "at least 1", "window_every", "window_stride")


def window_places(
    options: NoiseWindowOptions, noisy_steps: tuple[int, int] | None, steps: torch.Tensor
) -> list[tuple[int, int]]:
    """The windows of a training, in the order in which a sliding one visits them; none where it is fixed.

    Args:
        options: of the agent.
        noisy_steps: where the environment has its window, start and length.
        steps: the steps that can be noisy and are to be trained on, int64.

    Raises:
        ValueError: there is no window to move, or no room for it.
    """
    if options.noise_window == "fixed":
        return []
    if noisy_steps is None:
        raise ValueError(
            f"noise_window={options.noise_window!r} moves a window that the environment does not have; give it "
            "noisy_steps=(start, length), such as --env.noisy-steps 0 2"
        )
    (start, length), first, last = noisy_steps, int(steps[0]), int(steps[-1]) + 1 - noisy_steps[1]
    start = first if options.noise_window == "random" else start
    if not first <= start <= last:
        raise ValueError(
            f"noisy_steps={noisy_steps!r} has no room among the steps {first} to {int(steps[-1])}, which can have "
            f"noise and are in trained_steps; noise_window={options.noise_window!r} needs a shorter window or another "
            "start"
        )
    stride = 1 if options.noise_window == "random" else options.window_stride
    return [(place, length) for place in range(start, last + 1, stride)]


def window_at(
    options: NoiseWindowOptions, places: list[tuple[int, int]], seed_path: tuple[int, ...]
) -> tuple[int, int]:
    """The window of an iteration, which depends on nothing that happened before.

    Args:
        options: of the agent.
        places: of `window_places`.
        seed_path: of the iteration, whose number comes last.
    """
    if options.noise_window == "random":
        return places[int(np.random.default_rng(stream(seed_path, "window")).integers(len(places)))]
    return places[seed_path[-1] // options.window_every % len(places)]
