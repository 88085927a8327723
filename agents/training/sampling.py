"""What evaluations sample: pictures from noise that is the same for every policy, and means of their rewards."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from diffusion_gym.agents.policy import DenoisingPolicy
from diffusion_gym.agents.rollout import Trajectories, collect_many

# The second entry of a seed path, after the seed: what the noise is for.
TRAINING: Final = 0
GRIDS: Final = 1
EVALUATION: Final = 2
BENCHMARK: Final = 3
DEVELOPMENT: Final = 4


def sample(
    env: VectorEnv[Any, Any, Any],
    policy: DenoisingPolicy,
    samples: int,
    seed_path: tuple[int, ...],
    *,
    reference: bool = False,
) -> Trajectories:
    """Trajectories of the policy, or of the pretrained model where `reference`, from the noise of a seed path.

    Args:
        env: the environment; `samples` is rounded up to a multiple of its `num_envs`.
        policy: the policy.
        samples: pictures.
        seed_path: the seed, one of the numbers above, and what else tells the noise.
        reference: act with the pretrained model.
    """
    number = -(-samples // env.num_envs) * env.num_envs
    return collect_many(env, policy, number, seed_path, reference=reference)


def finite(values: torch.Tensor) -> np.ndarray:
    """The values that are numbers, float64 `(M,)`: a reward that failed is NaN or infinite."""
    numbers = values.double().cpu().numpy()
    return numbers[np.isfinite(numbers)]


def finite_mean(values: torch.Tensor) -> float:
    """The mean of the finite values; NaN where there are none."""
    numbers = finite(values)
    return float(numbers.mean()) if len(numbers) else float("nan")
