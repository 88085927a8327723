"""Rewards: one file each, found by name in `REWARDS`; a new file in this folder is found by itself."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

from diffusion_gym.rewards.base import REWARDS, Reward, RewardError, RewardOutput, evaluate

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def make_reward(reward: str | Reward | Callable[..., Any], **kwargs: Any) -> Reward:
    """Build a reward from its registered name, or pass a callable through.

    Args:
        reward: a name in `REWARDS`, or any callable `(images, prompts, metadata) -> RewardOutput or (N,) numbers`.
        **kwargs: the named reward's own keywords, such as `strict=True` for the Shapes rewards.

    Raises:
        ValueError: an unknown name, or keywords together with a callable.
        TypeError: a keyword that the reward does not take.
    """
    if isinstance(reward, str):
        return REWARDS[reward](**kwargs)
    if not callable(reward):
        raise ValueError(f"reward={reward!r} is neither a name nor a callable; known names: {', '.join(REWARDS)}")
    if kwargs:
        raise ValueError(f"reward_kwargs={kwargs!r} goes with a reward's name, not with a callable; bind them yourself")
    return reward


__all__ = ["REWARDS", "Reward", "RewardError", "RewardOutput", "evaluate", "make_reward"]
