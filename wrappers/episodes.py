"""What the vector wrappers share: which episodes a step moves, ends and begins, and whose container its numbers use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Events:
    """What one call did to N episodes.

    Attributes:
        moved: took a step, bool `(N,)`.
        ended: took their last one, bool `(N,)`.
        begun: were reset, so that the observation is the first of a new episode, bool `(N,)`.
    """

    moved: Mask
    ended: Mask
    begun: Mask


class EpisodesVectorEnv(VectorWrapper):
    """A vector wrapper that follows the episodes, in every autoreset mode.

    Args:
        env: a vector environment that names its `AutoresetMode` in its metadata.

    Attributes:
        events: what the last call did.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        super().__init__(env)
        nothing = np.zeros(env.num_envs, dtype=bool)
        self.events, self._idle = Events(nothing, nothing, nothing), nothing

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """As the wrapped environment's."""
        inner: Any = self.env  # Gymnasium's type leaves out lists of seeds
        observation, infos = inner.reset(seed=seed, options=options)
        begun, nothing = as_mask(infos["_prompt"]), np.zeros_like(self._idle)
        self.events, self._idle = Events(nothing, nothing, begun), self._idle & ~begun
        return observation, infos

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """As the wrapped environment's."""
        results = self.env.step(actions)
        _, _, terminations, truncations, _ = results
        mode = AutoresetMode(self.metadata["autoreset_mode"])
        # With NEXT_STEP the call after the end resets, and its action goes nowhere.
        moved, idle = ~self._idle, self._idle
        ended = moved & (as_mask(terminations) | as_mask(truncations))
        self._idle = ended if mode == AutoresetMode.NEXT_STEP else np.zeros_like(ended)
        self.events = Events(moved, ended, ended if mode == AutoresetMode.SAME_STEP else idle)
        return results


def require_states(env: Any, wrapper: str) -> None:
    """Refuse environments whose observations are not the states (c, t, x_t).

    Raises:
        ValueError: there are no `timestep` and `latents` in the observation space.
    """
    space = getattr(env, "single_observation_space", None)
    if not isinstance(space, spaces.Dict) or not {"timestep", "latents"} <= space.spaces.keys():
        raise ValueError(
            f"{wrapper}: env={env!r} does not show timestep and latents; wrap an environment of "
            "'DiffusionDenoise-...' before any wrapper that changes its observations, such as the one-step view"
        )


def as_mask(flags: Any) -> Mask:
    """Flags `(N,)`, of any container, as a NumPy mask."""
    return torch.as_tensor(flags).cpu().numpy().astype(bool)


def kept(observation: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of an observation, which its receiver may overwrite."""
    return {
        key: value.clone() if isinstance(value, torch.Tensor) else value.copy() for key, value in observation.items()
    }


def rows(observation: Mapping[str, Any], mask: Mask) -> dict[str, Any]:
    """The part of an observation that belongs to the environments in `mask`."""
    if mask.all():
        return dict(observation)
    index = np.flatnonzero(mask)
    return {
        key: value[torch.from_numpy(index).to(value.device)] if isinstance(value, torch.Tensor) else value[index]
        for key, value in observation.items()
    }


def spread(values: torch.Tensor, mask: Mask) -> torch.Tensor:
    """`values` of the environments in `mask` among zeros for the others, `(N,)`."""
    full = torch.zeros(len(mask), dtype=values.dtype, device=values.device)
    return full.index_copy(0, torch.from_numpy(np.flatnonzero(mask)).to(values.device), values)


def like(values: torch.Tensor, rewards: Any) -> Any:
    """`values` in the container, the type and on the device of `rewards`."""
    if isinstance(rewards, torch.Tensor):
        return values.to(rewards.device, rewards.dtype)
    return values.cpu().numpy().astype(rewards.dtype)


def with_info(infos: dict[str, Any], name: str, values: Any, mask: Mask) -> dict[str, Any]:
    """`infos` with `values` for the environments in `mask`, by Gymnasium's convention of `_name`."""
    return {**infos, name: values, f"_{name}": mask.copy()}
