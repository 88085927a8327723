"""The one-step view of the denoising process: state c, action x_0, reward r(x_0, c) (DDPO, section C.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space

from diffusion_gym.envs.vector import DenoisingVectorEnv
from diffusion_gym.wrappers.episodes import EpisodesVectorEnv, with_info
from diffusion_gym.wrappers.single import SingleWrapper


class OneStepVectorEnv(EpisodesVectorEnv):
    """A bandit over finished pictures: every episode has one step, whose action is x_0.

    An observation holds the `prompt` alone (nothing for an unconditional model). The noise x_T of a new episode is in
    `info["latents"]`: a policy that denoises it with the same noise gets the same reward as in T steps.

    Args:
        env: a denoising vector environment, wrapped or not.

    Attributes:
        horizon: steps of an episode, 1.

    Raises:
        ValueError: `env` is no denoising vector environment, or is the one-step view of one already.
    """

    horizon = 1

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        _require_denoising(env)
        super().__init__(env)
        self.single_observation_space = _state_space(env.single_observation_space)
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """New prompts; `info["latents"]` has the noise x_T. Arguments as the wrapped environment's."""
        observation, infos = super().reset(seed=seed, options=options)
        return _state(observation), self._with_noise(observation, infos)

    def step(self, actions: Any) -> tuple[dict[str, Any], Any, Any, Any, dict[str, Any]]:
        """Score x_0, float32 `(N, C, H, W)`: every episode ends. Results as the wrapped environment's last step."""
        inner: Any = self.env.unwrapped
        inner.skip_to_last_step()
        observation, rewards, terminations, truncations, infos = super().step(actions)
        if (final_obs := infos.get("final_obs")) is not None:
            states = np.full_like(final_obs, None)
            states[:] = [None if last is None else _state(last) for last in final_obs]
            infos = {**infos, "final_obs": states}
        return _state(observation), rewards, terminations, truncations, self._with_noise(observation, infos)

    def _with_noise(self, observation: dict[str, Any], infos: dict[str, Any]) -> dict[str, Any]:
        """`infos` with x_T of the episodes that have begun, if any."""
        begun = self.events.begun
        return with_info(infos, "latents", observation["latents"], begun) if begun.any() else infos


class OneStep(SingleWrapper[OneStepVectorEnv], RecordConstructorArgs):
    """`OneStepVectorEnv` for a single environment; its spec makes it again."""

    kind = OneStepVectorEnv


def _require_denoising(env: Any) -> None:
    if not isinstance(getattr(env, "unwrapped", None), DenoisingVectorEnv) or not isinstance(env, VectorEnv):
        raise ValueError(
            f"env={env!r} is not made by gym.make or gym.make_vec('DiffusionDenoise-...'); OneStep takes one of the "
            "first, OneStepVectorEnv of the second"
        )
    space: Any = env.single_observation_space
    if "latents" not in space.spaces:
        raise ValueError(f"env={env!r} shows no latents, so that x_T is not known; is it a one-step view already?")


def _state_space(space: Any) -> spaces.Dict:
    return spaces.Dict(_state(space.spaces))


def _state(observation: Mapping[str, Any]) -> dict[str, Any]:
    """What is left of an observation: the prompt c, nothing for an unconditional model."""
    return {key: observation[key] for key in observation if key == "prompt"}
