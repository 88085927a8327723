"""A vector environment of one as a plain Gymnasium environment: its NumPy view at N = 1."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv


class SingleView(gym.Env[Any, Any]):
    """A vector environment of one as a single environment.

    Args:
        vector: a vector environment, wrapped or not, with `num_envs=1`, `output="numpy"` and autoreset disabled.

    Attributes:
        vector: the same; it does the work.
    """

    def __init__(self, vector: VectorEnv[Any, Any, Any]) -> None:
        self.vector = vector
        self.observation_space, self.action_space = vector.single_observation_space, vector.single_action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode; `options` may fix `prompt` (a string) and `latents` `(C, H, W)`."""
        observation, infos = self.vector.reset(seed=seed, options=options)
        return _first(observation), _first(infos)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Take x_{t-1}, float32 `(C, H, W)`; see `DenoisingVectorEnv.step`."""
        batch = action[None] if hasattr(action, "shape") else [action]
        observation, rewards, terminations, truncations, infos = self.vector.step(batch)
        flags = bool(terminations[0]), bool(truncations[0])
        return _first(observation), float(rewards[0]), *flags, _first(infos)

    def render(self) -> Any:
        """The decoded preview of x_t, uint8 `(H, W, 3)`."""
        frames = self.vector.render()
        return None if frames is None else frames[0]

    def close(self) -> None:
        """Close the vector environment."""
        self.vector.close()


def _first(values: Any) -> Any:
    """The entries of env 0, without Gymnasium's `_key` masks, numbers as Python's."""
    if isinstance(values, dict):
        return {key: _first(value) for key, value in values.items() if not key.startswith("_")}
    return values[0].item() if isinstance(values[0], np.generic) else values[0]
