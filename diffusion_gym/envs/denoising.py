"""One denoising process as a plain Gymnasium environment, and what `help` says of it."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode

from diffusion_gym.envs.checks import check_action
from diffusion_gym.envs.description import description
from diffusion_gym.envs.single import SingleView
from diffusion_gym.envs.vector import DenoisingVectorEnv
from diffusion_gym.registry import WrongKeyword


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
        self.__doc__ = description(vector)  # what `help(env)` shows

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
