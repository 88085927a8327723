"""Rewards: one file each, found by name in `REWARDS`; a new file in this folder is found by itself."""

from __future__ import annotations

import importlib
import pkgutil

from diffusion_gym.rewards.base import REWARDS, Reward, RewardError, RewardOutput, evaluate
from diffusion_gym.rewards.factory import default_prompts, make_reward

for _module in pkgutil.iter_modules(__path__):
    # These write checkpoints and hold no reward; Python warns of a program that is imported before it is run.
    if not _module.name.startswith("random_"):
        importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["REWARDS", "Reward", "RewardError", "RewardOutput", "default_prompts", "evaluate", "make_reward"]
