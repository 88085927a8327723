"""Rewards whose scores have a gradient with respect to the pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from diffusion_gym.rewards.base import Reward, RewardOutput, reward_name
from diffusion_gym.rewards.time_limit import TimeLimited


def is_differentiable(reward: Reward) -> bool:
    """Whether a reward, with or without a time limit, says `differentiable = True`."""
    return bool(getattr(_unlimited(reward), "differentiable", False))


def differentiable_scores(
    reward: Reward, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> torch.Tensor:
    """The scores `(N,)` of such a reward with their gradient; a time limit does not hold here.

    Args:
        reward: the reward.
        images: with gradient, float `(N, 3, H, W)` in [0, 1].
        prompts: N strings.
        metadata: N mappings.

    Raises:
        ValueError: the scores have no gradient, or are not one a picture.
    """
    output: Any = _unlimited(reward)(images, prompts, metadata)
    scores: torch.Tensor = output.scores if isinstance(output, RewardOutput) else output
    if tuple(scores.shape) != (len(prompts),) or not scores.requires_grad:
        raise ValueError(
            f"reward={reward_name(reward)!r} says differentiable = True, but its scores are of shape "
            f"{tuple(scores.shape)} with requires_grad={scores.requires_grad}; return ({len(prompts)},) scores made "
            "of the images without detach or no_grad"
        )
    return scores


def _unlimited(reward: Any) -> Any:
    """The reward without a time limit, whose thread hands back numbers alone."""
    return reward.reward if isinstance(reward, TimeLimited) else reward
