"""Observation and action spaces of a model's denoising process."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from gymnasium import spaces

from diffusion_gym.models import DenoisingModel
from diffusion_gym.scheduling import TERMINAL

# Finite, because Stable-Baselines3 refuses infinite bounds; far beyond any latent, so that nothing is ever clipped.
LATENT_BOUND: Final = 1e3


def make_spaces(model: DenoisingModel) -> tuple[spaces.Dict, spaces.Box]:
    """The spaces of one environment: state (c, t, x_t) and action x_{t-1}.

    Returns:
        `Dict(prompt int64 (L,), timestep int64 (1,), latents float32 (C, H, W))`, without `prompt` where the model
        is unconditional; and `Box float32 (C, H, W)`.
    """
    latents = spaces.Box(-LATENT_BOUND, LATENT_BOUND, model.latent_shape, np.float32)
    parts: dict[str, spaces.Space[Any]] = {
        "timestep": spaces.Box(TERMINAL, model.num_train_timesteps, (1,), np.int64),
        "latents": latents,
    }
    if model.prompt_length:
        parts["prompt"] = spaces.Box(0, model.vocab_size - 1, (model.prompt_length,), np.int64)
    return spaces.Dict(parts), spaces.Box(-LATENT_BOUND, LATENT_BOUND, model.latent_shape, np.float32)
