"""Tianshou's collector, with a buffer of the size of a rollout."""

from __future__ import annotations

from typing import Any

from tianshou.algorithm.algorithm_base import Algorithm
from tianshou.data import Collector, CollectStats, VectorReplayBuffer

from diffusion_gym.agents.adapters import env_identity
from diffusion_gym.agents.identity import require_same
from diffusion_gym.agents.tianshou.env import TianshouVectorEnv
from diffusion_gym.agents.tianshou.policy import GuidedPolicy, policy_identity


class TrajectoryCollector(Collector[CollectStats]):
    """A collector whose buffer holds `episodes` trajectories and no more.

    Tianshou's own default keeps room for 10,000 steps of each env, gigabytes of latents; and a buffer that is too small
    forgets its first trajectories and says nothing.

    Args:
        algorithm: the algorithm or its policy.
        env: a denoising vector environment, Gymnasium's or Tianshou's.
        episodes: trajectories of a rollout, best a multiple of `num_envs`.
        **options: of Tianshou's `Collector`.

    Raises:
        ValueError: `env` is not what `TianshouVectorEnv` takes or is not the policy's, or there are no episodes.
    """

    def __init__(self, algorithm: Algorithm[Any, Any] | GuidedPolicy, env: Any, episodes: int, **options: Any) -> None:
        if episodes < 1:
            raise ValueError(f"episodes={episodes!r} must be at least 1")
        envs = env if isinstance(env, TianshouVectorEnv) else TianshouVectorEnv(env)
        policy = getattr(algorithm, "policy", algorithm)
        require_same(policy_identity(policy), env_identity(envs))
        self._horizon = envs.vector.horizon
        steps = -(-episodes // len(envs)) * len(envs) * self._horizon
        # The next observation of a step is the observation of the next step.
        super().__init__(algorithm, envs, VectorReplayBuffer(steps, len(envs), ignore_obs_next=True), **options)

    def collect(
        self, n_step: int | None = None, n_episode: int | None = None, *args: Any, **options: Any
    ) -> CollectStats:
        """As Tianshou's.

        Raises:
            ValueError: the buffer has no room for the rollout.
        """
        asked = f"n_step={n_step}" if n_step else f"n_episode={n_episode}"
        steps = -(-n_step // self.env_num) if n_step else -(-(n_episode or 0) // self.env_num) * self._horizon
        buffers: Any = self.buffer
        room = min(part.maxsize - len(part) for part in buffers.buffers)
        if steps > room:
            raise ValueError(
                f"{asked}: {steps} steps of each env do not fit into the buffer, which has room for {room}; make the "
                "collector with more episodes, or call reset_buffer() first"
            )
        return super().collect(n_step, n_episode, *args, **options)
