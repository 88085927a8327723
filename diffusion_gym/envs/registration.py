"""The environment ids: `DiffusionDenoise-<Model>-<Reward>-v0`, one for every model and reward that fit."""

from __future__ import annotations

from typing import Final

import gymnasium as gym

from diffusion_gym.models import MODELS
from diffusion_gym.rewards import REWARDS

PREFIX: Final = "DiffusionDenoise"
GENERIC_ID: Final = f"{PREFIX}-v0"


def environment_ids() -> dict[str, dict[str, str]]:
    """All ids with the keyword arguments that each stands for."""
    ids: dict[str, dict[str, str]] = {}
    for model in MODELS:
        for reward in REWARDS:
            if REWARDS.fits(reward, MODELS.traits(model)):
                ids[f"{PREFIX}-{model}-{reward}-v0"] = {"model": model, "reward": reward}
    return ids


def register_all() -> None:
    """Register every id with Gymnasium; ids that are there already stay as they are."""
    for id_, kwargs in {GENERIC_ID: {}, **environment_ids()}.items():
        if id_ not in gym.registry:
            gym.register(
                id=id_,
                entry_point="diffusion_gym.envs.denoising:DenoisingEnv",
                vector_entry_point="diffusion_gym.envs.vector:DenoisingVectorEnv",
                kwargs=kwargs,
                # The environment refuses steps out of order by itself, and the tests check its spaces: without
                # Gymnasium's two wrappers `gym.make` gives the environment itself, whose `help` is its own.
                order_enforce=False,
                disable_env_checker=True,
            )
