"""A denoising vector environment as Stable-Baselines3's `VecEnv`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal, get_args

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from diffusion_gym.agents.adapters import SharedEnv, info_rows, layers, require_finite_rewards, to_numpy, to_tensors

FailedRewards = Literal["refuse", "keep"]
_OF_THE_END = ("final_obs", "final_info", "episode")
WHY_FINITE = (
    "which would make SB3's weights NaN; let the reward return a number, or leave such trajectories out: ddpo_is or "
    "ddpo_sf with trained_steps=(0, 1), or DDPOPPO"
)


class SB3VecEnv(SharedEnv, VecEnv):
    """N denoising processes for Stable-Baselines3, stepped as one batch.

    As SB3 wants it, the observation after the last step is the next episode's, and the finished one is in
    `infos[i]["terminal_observation"]`; `infos[i]["TimeLimit.truncated"]` is false, because T steps are the whole
    process. `infos[i]["episode"]` has return, length and time, so that SB3 logs them with no `VecMonitor`.

    Args:
        env: what `gym.make_vec("DiffusionDenoise-...")` gives, wrapped or not, in any autoreset mode.
        output: what observations are: `numpy` arrays, or `torch` tensors on the environment's device, which SB3's
            rollout takes too and its own buffers do not. Rewards and flags are always NumPy.
        failed_rewards: what to do with a reward that is NaN or infinite: `refuse` it, because SB3's algorithms would
            train on it; or `keep` it for an algorithm that leaves such trajectories out.

    Attributes:
        env: the vector environment.
        vector: the denoising environment below its wrappers.

    Raises:
        ValueError: `env` is no denoising vector environment, or its actions are unbounded.
    """

    def __init__(
        self,
        env: VectorEnv[Any, Any, Any],
        *,
        output: Literal["numpy", "torch"] = "numpy",
        failed_rewards: FailedRewards = "refuse",
    ) -> None:
        self.share(env)
        if output not in ("numpy", "torch"):
            raise ValueError(f"output={output!r} must be 'numpy' or 'torch'")
        if failed_rewards not in get_args(FailedRewards):
            raise ValueError(f"failed_rewards={failed_rewards!r} must be 'refuse' or 'keep'")
        space: Any = env.single_action_space
        if not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
            raise ValueError(
                f"action_space={space} is unbounded, which SB3 refuses; take the wrapper off that clips actions "
                "(the environment's own bounds never do)"
            )
        self.output, self.failed_rewards, self.spec = output, failed_rewards, env.spec
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)
        self._same_step = self.vector.autoreset_mode == AutoresetMode.SAME_STEP
        self._began = time.time()
        self._returns, self._lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=int)
        self._actions: Any = None

    def reset(self) -> dict[str, Any]:  # type: ignore[override]
        """Start new episodes, with the seeds of `seed` and the options of `set_options`; both count once."""
        seeds: Any = None if all(seed is None for seed in self._seeds) else list(self._seeds)
        observation, infos = self.env.reset(seed=seeds, options=self._batched_options())
        self._reset_seeds()
        self._reset_options()
        self._returns[:], self._lengths[:] = 0, 0
        self.reset_infos = self._rows(infos)
        return self._out(observation)

    def step_async(self, actions: np.ndarray) -> None:
        """Keep x_{t-1}, float32 `(N, C, H, W)`, for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Take the step: observations, rewards `(N,)`, dones `(N,)`, one info an env.

        Raises:
            ValueError: a reward is NaN or infinite, and `failed_rewards` is `refuse`.
        """
        observation, rewards, terminations, truncations, infos = self.env.step(self._actions)
        scores = to_numpy(rewards).astype(np.float32)
        if self.failed_rewards == "refuse":
            require_finite_rewards(scores, WHY_FINITE)
        terminated = to_numpy(terminations)
        ended = terminated | to_numpy(truncations)
        self._returns += scores
        self._lengths += 1
        observation, rows = (
            self._turn_over(observation, infos, ended) if ended.any() else (observation, self._rows(infos))
        )
        for index, row in enumerate(rows):
            row["TimeLimit.truncated"] = bool(ended[index] and not terminated[index])
        return self._out(observation), scores, ended, rows

    def _turn_over(
        self, observation: dict[str, Any], infos: dict[str, Any], ended: np.ndarray
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Observations and infos after a step at which the episodes `ended`, and have begun anew."""
        over = np.flatnonzero(ended)
        if self._same_step:
            last = {key: _stack([infos["final_obs"][i][key] for i in over]) for key in observation}
            # What goes on has its infos at the top; what has ended has them below, but for Gymnasium's statistics.
            statistics: dict[str, Any] = {key: infos[key] for key in ("episode", "_episode") if key in infos}
            begun, ends = self._rows(infos, _OF_THE_END), self._rows({**statistics, **infos["final_info"]})
            rows = [ends[index] if ended[index] else row for index, row in enumerate(begun)]
        else:
            last, rows = {key: observation[key][over] for key in observation}, self._rows(infos)
            observation, fresh = self.env.reset(options={"reset_mask": ended.copy()})
            begun = self._rows(fresh)
        last, seconds = self._out(last), round(time.time() - self._began, 6)
        for row, index in enumerate(over):
            rows[index]["terminal_observation"] = {key: value[row] for key, value in last.items()}
            summary = {"r": float(self._returns[index]), "l": int(self._lengths[index]), "t": seconds}
            rows[index].setdefault("episode", summary)
            self.reset_infos[index] = begun[index]
        self._returns[over], self._lengths[over] = 0, 0
        return observation, rows

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        """The decoded preview of every x_t, uint8 `(H, W, 3)`; needs `render_mode="rgb_array"`."""
        return self.frames()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute of the environment or its wrappers, once for each of `indices`; see `SharedEnv.shared`."""
        return [self.shared(attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute for all envs; see `SharedEnv.set_shared`."""
        self.set_shared(attr_name, value, list(self._get_indices(indices)), f"indices={indices!r}")

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of the vector environment once.

        Returns:
            For each of `indices` its part of the result, where that has one part an env; else the whole result.
        """
        result = self.shared(method_name)(*method_args, **method_kwargs)
        parts = isinstance(result, list | tuple | np.ndarray | torch.Tensor) and len(result) == self.num_envs
        return [result[index] if parts else result for index in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """Whether a wrapper of that class, such as a vector wrapper of Gymnasium, is around the environment."""
        wrapped = any(isinstance(layer, wrapper_class) for layer in layers(self.env))
        return [wrapped for _ in self._get_indices(indices)]

    def _rows(self, infos: dict[str, Any], without: Sequence[str] = ()) -> list[dict[str, Any]]:
        return info_rows(infos, np.arange(self.num_envs), without)

    def _batched_options(self) -> dict[str, Any] | None:
        names = list(dict.fromkeys(name for options in self._options for name in options))
        for name in names:
            if name == "reset_mask" or not all(name in options for options in self._options):
                raise ValueError(f"options[{name!r}] must be given for all {self.num_envs} envs; reset takes them all")
        batched: dict[str, Any] = {name: [options[name] for options in self._options] for name in names}
        if "latents" in batched:
            batched["latents"] = np.stack([to_numpy(latents) for latents in batched["latents"]])
        return batched or None

    def _out(self, observation: dict[str, Any]) -> dict[str, Any]:
        if self.output == "numpy":
            return {key: to_numpy(value) for key, value in observation.items()}
        return to_tensors(observation, self.vector.device)


def _stack(parts: list[Any]) -> Any:
    return torch.stack(parts) if isinstance(parts[0], torch.Tensor) else np.stack(parts)
