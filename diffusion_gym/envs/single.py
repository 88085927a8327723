"""One denoising process as a plain Gymnasium environment: the NumPy view of the vector environment at N = 1."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from diffusion_gym.envs.checks import check_action
from diffusion_gym.envs.vector import DenoisingVectorEnv
from diffusion_gym.registry import WrongKeyword


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


class DenoisingEnv(SingleView):
    """A denoising process that any Gymnasium user can step.

    Args:
        render_mode: None or `rgb_array`, the decoded preview of x_t.
        **kwargs: as `DenoisingVectorEnv`, except for `num_envs`, `autoreset_mode` and `output`.

    Attributes:
        vector: the vector environment that does the work; it holds the model, the sampler and the reward.
    """

    metadata: dict[str, Any] = dict(DenoisingVectorEnv.metadata)
    vector: DenoisingVectorEnv

    def __init__(self, *, render_mode: str | None = None, **kwargs: Any) -> None:
        for name in ("num_envs", "autoreset_mode", "output"):
            if name in kwargs:
                raise WrongKeyword(
                    f"{name}={kwargs[name]!r} belongs to gym.make_vec; gym.make gives a single environment"
                )
        disabled = AutoresetMode.DISABLED
        vector = DenoisingVectorEnv(1, render_mode=render_mode, autoreset_mode=disabled, output="numpy", **kwargs)
        super().__init__(vector)
        self.render_mode = render_mode

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode; `options` may fix `prompt` (a string) and `latents` `(C, H, W)`."""
        # Gymnasium's own reset seeds first, and a refused call would have changed that.
        results = super().reset(seed=seed, options=options)
        self._np_random, self._np_random_seed = self.vector._np_random, self.vector._np_random_seed
        return results

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Take x_{t-1}, float32 `(C, H, W)`; see `DenoisingVectorEnv.step`."""
        return super().step(check_action(action, self.vector.model.latent_shape, self.vector.device))


def _first(values: Any) -> Any:
    """The entries of env 0, without Gymnasium's `_key` masks, numbers as Python's."""
    if isinstance(values, dict):
        return {key: _first(value) for key, value in values.items() if not key.startswith("_")}
    return values[0].item() if isinstance(values[0], np.generic) else values[0]
