"""One denoising process as a plain Gymnasium environment: the NumPy view of the vector environment at N = 1."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

from diffusion_gym.envs.checks import check_action
from diffusion_gym.envs.vector import DenoisingVectorEnv
from diffusion_gym.registry import WrongKeyword


class DenoisingEnv(gym.Env[dict[str, np.ndarray], np.ndarray]):
    """A denoising process that any Gymnasium user can step.

    Args:
        render_mode: None or `rgb_array`, the decoded preview of x_t.
        **kwargs: as `DenoisingVectorEnv`, except for `num_envs`, `autoreset_mode` and `output`.

    Attributes:
        vector: the vector environment that does the work; it holds the model, the sampler and the reward.
    """

    metadata: dict[str, Any] = dict(DenoisingVectorEnv.metadata)

    def __init__(self, *, render_mode: str | None = None, **kwargs: Any) -> None:
        for name in ("num_envs", "autoreset_mode", "output"):
            if name in kwargs:
                raise WrongKeyword(
                    f"{name}={kwargs[name]!r} belongs to gym.make_vec; gym.make gives a single environment"
                )
        self.vector = DenoisingVectorEnv(
            1, render_mode=render_mode, autoreset_mode=AutoresetMode.DISABLED, output="numpy", **kwargs
        )
        self.render_mode = render_mode
        self.observation_space = self.vector.single_observation_space
        self.action_space = self.vector.single_action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode; `options` may fix `prompt` (a string) and `latents` `(C, H, W)`."""
        # Gymnasium's own reset seeds first, and a refused call would have changed that.
        observation, infos = self.vector.reset(seed=seed, options=options)
        self._np_random, self._np_random_seed = self.vector._np_random, self.vector._np_random_seed
        return _first(observation), _first(infos)

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Take x_{t-1}, float32 `(C, H, W)`; see `DenoisingVectorEnv.step`."""
        latents = check_action(action, self.vector.model.latent_shape, self.vector.device)
        observation, rewards, terminations, _, infos = self.vector.step(latents[None])
        return _first(observation), float(rewards[0]), bool(terminations[0]), False, _first(infos)

    def render(self) -> np.ndarray | None:  # type: ignore[override]
        """The decoded preview of x_t, uint8 `(H, W, 3)`."""
        frames = self.vector.render()
        return None if frames is None else frames[0]

    def close(self) -> None:
        """Let go of the batch."""
        self.vector.close()


def _first(values: dict[str, Any]) -> dict[str, Any]:
    """The entries of env 0, without Gymnasium's `_key` masks."""
    return {
        key: _first(value) if isinstance(value, dict) else value[0]
        for key, value in values.items()
        if not key.startswith("_")
    }
