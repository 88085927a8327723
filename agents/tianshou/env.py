"""A denoising vector environment as Tianshou's `BaseVectorEnv`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from tianshou.data import Batch
from tianshou.env import BaseVectorEnv

from diffusion_gym.agents.adapters import SharedEnv, info_rows, require_finite_rewards, require_spaces, to_numpy
from diffusion_gym.envs.vector import DenoisingVectorEnv

Ids = int | list[int] | np.ndarray | None
_LEFT_OUT = "image"  # Tianshou's buffers would keep room for a picture at every step


class TianshouVectorEnv(SharedEnv, BaseVectorEnv):
    """N denoising processes for Tianshou's collectors, stepped as one batch and reset by id.

    Observations are a `Batch` of NumPy arrays; `info` of env i has `env_id`, `prompt` and, at the end, the reward's
    `reward_components`. Pictures are left out: `RecordPicturesVectorEnv` below this adapter saves them.

    A batch of latents moves as one, so that envs left out of a `step` must be at the start of their episodes, which is
    where Tianshou's `Collector` leaves envs out (`n_episode` not a multiple of N). They stay there: same prompt, same
    noise, no picture scored.

    Args:
        env: what `gym.make_vec("DiffusionDenoise-...", autoreset_mode="Disabled")` gives, wrapped or not.

    Attributes:
        env: the vector environment.
        vector: the denoising environment below its wrappers.

    Raises:
        ValueError: `env` is no denoising vector environment, resets by itself, or has a wrapper that changes what
            the policy sees or does.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        self.share(env)
        mode = self.vector.autoreset_mode
        if mode != AutoresetMode.DISABLED:
            raise ValueError(
                f"autoreset_mode={mode.value!r}: Tianshou resets envs itself; make the environment with "
                "autoreset_mode='Disabled'"
            )
        require_spaces(self.vector.model, env.single_observation_space, env.single_action_space, "single_")
        # Not Tianshou's own __init__, which makes one worker an env.
        self.env_num, self.is_async, self.is_closed = env.num_envs, False, False
        self._seeds: list[int | None] = [None] * self.env_num
        self._observation: dict[str, np.ndarray] = {}
        self._prompts = np.full(self.env_num, None, dtype=object)
        self._taken = np.zeros(self.env_num, dtype=int)  # steps of the current episodes

    @property
    def unwrapped(self) -> DenoisingVectorEnv:
        """The denoising environment, as Gymnasium calls it."""
        return self.vector

    def reset(
        self,
        env_id: Ids = None,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
        **unknown: Any,
    ) -> tuple[Any, np.ndarray]:
        """Start new episodes in some envs, all by default.

        Args:
            env_id: which.
            seed: env i gets `seed + i`, or `seed[i]`; by default what `seed()` was given, once.
            options: `prompt` and `latents`, as the environment's.
            **unknown: none.

        Returns:
            The observations and infos of those envs, in their order.
        """
        if unknown:
            raise TypeError(f"reset takes seed and options, not {', '.join(unknown)}")
        ids = self._ids(env_id)
        mask = np.isin(np.arange(self.env_num), ids)
        if seed is None:
            seed = [planned if chosen else None for planned, chosen in zip(self._seeds, mask, strict=True)]
        given: Any = seed  # Gymnasium's type leaves out lists of seeds
        observation, infos = self.env.reset(seed=given, options={**(options or {}), "reset_mask": mask})
        self._seeds = [None if chosen else planned for planned, chosen in zip(self._seeds, mask, strict=True)]
        self._prompts[ids] = infos["prompt"][ids]
        self._taken[ids] = 0
        return self._observe(observation, ids), self._infos(infos, ids)

    def step(
        self, action: np.ndarray | torch.Tensor | None, id: Ids = None
    ) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Carry x_{t-1} over in some envs, all by default; the others stay where they are.

        Args:
            action: float32 `(len(id), C, H, W)`.
            id: which; the others must be at the start of their episodes.

        Returns:
            Observations, rewards, terminated, truncated and infos of those envs, in their order.

        Raises:
            ValueError: not one action an env, envs left out within an episode, or a reward that is not finite.
        """
        ids = self._ids(id)
        actions = to_numpy(action)
        if len(actions) != len(ids):
            raise ValueError(f"action holds {len(actions)} actions for the {len(ids)} envs {ids.tolist()}")
        resting = ~np.isin(np.arange(self.env_num), ids)
        self._require_at_start(resting)
        latents = self._observation["latents"].copy()
        latents[ids] = actions
        observation, rewards, terminated, truncated, infos = self.env.step(latents)
        if resting.any():  # what rests took a step in place: back to its start, before it can end
            start = {"latents": self._observation["latents"].copy(), "prompt": self._prompts.tolist()}
            self.env.reset(options={"reset_mask": resting, **start})
        self._taken[ids] += 1
        scores = to_numpy(rewards)[ids]
        why = "and Tianshou cannot leave a trajectory out; let the reward return a number, or train with a native agent"
        require_finite_rewards(scores, why, ids)
        flags = to_numpy(terminated)[ids], to_numpy(truncated)[ids]
        return self._observe(observation, ids), scores, *flags, self._infos(infos, ids)

    def seed(self, seed: int | list[int] | None = None) -> list[list[int] | None]:
        """Seed the next `reset` of each env: env i with `seed + i`, or `seed[i]`."""
        self._assert_is_not_closed()
        counted = [None if seed is None or isinstance(seed, list) else int(seed) + i for i in range(len(self))]
        seeds: list[int | None] = [*seed] if isinstance(seed, list) else counted
        if len(seeds) != len(self):
            raise ValueError(f"seed={seed!r} lists {len(seeds)} seeds for {len(self)} envs; give one each")
        self._seeds = seeds
        return [None if one is None else [one] for one in seeds]

    def render(self, **kwargs: Any) -> list[Any]:
        """The decoded preview of every x_t, uint8 `(H, W, 3)`; needs `render_mode="rgb_array"`."""
        self._assert_is_not_closed()
        return self.frames()

    def close(self) -> None:
        """Close the environment."""
        self._assert_is_not_closed()
        self.env.close()
        self.is_closed = True

    def get_env_attr(self, key: str, id: Ids = None) -> list[Any]:
        """An attribute of the environment or its wrappers, once for each of `id`; see `SharedEnv.shared`."""
        return [self.shared(key) for _ in self._ids(id)]

    def set_env_attr(self, key: str, value: Any, id: Ids = None) -> None:
        """Set an attribute for all envs; see `SharedEnv.set_shared`."""
        self.set_shared(key, value, self._ids(id).tolist(), f"id={id!r}")

    def _ids(self, id: Ids) -> np.ndarray:
        self._assert_is_not_closed()
        ids = np.asarray(self._wrap_id(id), dtype=int)
        if len(np.unique(ids)) != len(ids) or not np.isin(ids, np.arange(self.env_num)).all() or not len(ids):
            raise ValueError(f"id={ids.tolist()} must name different envs of 0 to {self.env_num - 1}")
        return ids

    def _require_at_start(self, resting: np.ndarray) -> None:
        within = np.flatnonzero(resting & (self._taken > 0)).tolist()
        if within:
            raise ValueError(
                f"step leaves env {within} out within an episode; step all envs until their episodes end, or reset "
                "those that are to wait"
            )
        if resting.any() and self.vector.horizon == 1:
            raise ValueError(
                f"step leaves env {np.flatnonzero(resting).tolist()} out, which would end with T=1; make n_episode a "
                f"multiple of num_envs={self.env_num}"
            )

    def _observe(self, observation: dict[str, Any], ids: np.ndarray) -> Any:
        """The observations of the envs `ids`, which are also what those are left with; the others keep theirs."""
        for key, value in observation.items():
            array = to_numpy(value)
            if key not in self._observation:
                self._observation[key] = array.copy()
            self._observation[key][ids] = array[ids]
        return Batch({key: value[ids] for key, value in self._observation.items()})

    def _infos(self, infos: dict[str, Any], ids: np.ndarray) -> np.ndarray:
        rows = np.empty(len(ids), dtype=object)
        for position, row in enumerate(info_rows(infos, ids, without=(_LEFT_OUT,))):
            rows[position] = {**row, "env_id": int(ids[position])}
        return rows
