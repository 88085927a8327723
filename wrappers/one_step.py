"""The one-step view of the denoising process: state c, action x_0, reward r(x_0, c) (DDPO, section C.2)."""

from __future__ import annotations

from typing import Any

from gymnasium import spaces
from gymnasium.vector import VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space

from diffusion_gym.envs.vector import DenoisingVectorEnv


class OneStepVectorEnv(VectorWrapper):
    """A bandit over finished pictures: every episode has one step, whose action is x_0.

    An observation holds the `prompt` alone (nothing for an unconditional model). The noise x_T that the environment
    drew is in `info["latents"]`: a policy that denoises it with the same noise gets the same reward as in T steps.

    Args:
        env: a denoising vector environment.

    Raises:
        ValueError: `env` is no denoising vector environment.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        if not isinstance(env.unwrapped, DenoisingVectorEnv):
            raise ValueError(f"env={env!r} is no denoising vector environment; make one with gym.make_vec")
        super().__init__(env)
        inner = env.unwrapped.single_observation_space
        assert isinstance(inner, spaces.Dict)
        self._kept = [key for key in inner if key == "prompt"]
        self.single_observation_space = spaces.Dict({key: inner[key] for key in self._kept})
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """New prompts; `info["latents"]` has the noise x_T. Arguments as the wrapped environment's."""
        observation, infos = self.env.reset(seed=seed, options=options)
        return self._view(observation, infos)

    def step(self, actions: Any) -> tuple[dict[str, Any], Any, Any, Any, dict[str, Any]]:
        """Score x_0, float32 `(N, C, H, W)`: every episode ends."""
        inner: Any = self.env.unwrapped
        observation, rewards, terminations, truncations, infos = inner.finish(actions)
        observation, infos = self._view(observation, infos)
        return observation, rewards, terminations, truncations, infos

    def _view(self, observation: dict[str, Any], infos: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        infos = {**infos, "latents": observation["latents"], "_latents": infos["_prompt"]}
        return {key: observation[key] for key in self._kept}, infos
