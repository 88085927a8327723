"""The denoised estimates x0~ along trajectories, and what the reward says of each (thesis, figures 4.3 and 4.4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from gymnasium.vector import VectorEnv

from diffusion_gym.agents.policy import DenoisingPolicy
from diffusion_gym.agents.rollout import Trajectories
from diffusion_gym.envs.vector import DenoisingVectorEnv
from diffusion_gym.images import to_uint8
from diffusion_gym.rewards import evaluate


@dataclass(frozen=True)
class DenoisedPath:
    """What the pictures of M trajectories would be if they ended at each of the T steps.

    Attributes:
        images: decoded x0~ of x_T to x_1, and the finished picture last: uint8 `(T + 1, M, H, W, 3)`.
        rewards: the reward of each, float32 `(T + 1, M)`.
    """

    images: torch.Tensor
    rewards: torch.Tensor


@torch.no_grad()
def denoised_path(
    env: VectorEnv[Any, Any, Any], policy: DenoisingPolicy, trajectories: Trajectories, number: int
) -> DenoisedPath:
    """The path of the first `number` trajectories; each step is one batch.

    Args:
        env: the environment that the trajectories came from; it decodes and scores.
        policy: the policy that sampled them.
        trajectories: with all latents, not the one-step view.
        number: how many, M.
    """
    base = cast(DenoisingVectorEnv, env.unwrapped)
    samples = torch.arange(min(number, len(trajectories)), device=policy.device)
    prompts = list(trajectories.prompts[: len(samples)])
    metadata = base.prompt_set.metadata_of(prompts)
    images, rewards = [], []
    for step in range(len(policy.table) + 1):
        if step < len(policy.table):
            estimate = policy.denoised(trajectories.states(samples, torch.full_like(samples, step)))
        else:
            estimate = trajectories.finished[samples]
        decoded = base.model.decode(estimate)
        images.append(to_uint8(decoded).cpu())
        rewards.append(evaluate(base.reward, decoded, prompts, metadata).scores.cpu())
    return DenoisedPath(torch.stack(images), torch.stack(rewards))
