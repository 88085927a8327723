"""Where a denoising environment is below what was put around it."""

from __future__ import annotations

from typing import Any

from diffusion_gym.envs.vector import DenoisingVectorEnv


def denoising_env(env: Any) -> DenoisingVectorEnv:
    """The denoising vector environment below wrappers, adapters of libraries and single environments.

    Args:
        env: a denoising environment, single or vectorised, wrapped or not, Gymnasium's, SB3's or Tianshou's.

    Raises:
        ValueError: there is none.
    """
    base: Any = getattr(env, "unwrapped", env)
    if hasattr(base, "envs"):  # single ones, as SB3 makes a batch of them
        base = base.envs[0].unwrapped
    base = getattr(base, "vector", base)
    if not isinstance(base, DenoisingVectorEnv):
        raise ValueError(
            f"env={env!r} is no denoising environment; make one with gym.make('DiffusionDenoise-...') or gym.make_vec"
        )
    return base
