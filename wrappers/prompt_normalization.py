"""Rewards normalised for each prompt on its own: DDPO's advantages (section F.3), for any library's algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray

from diffusion_gym.wrappers.episodes import EpisodesVectorEnv, like
from diffusion_gym.wrappers.kl_penalty import KLPenaltyVectorEnv
from diffusion_gym.wrappers.preview_reward import PreviewRewardVectorEnv
from diffusion_gym.wrappers.single import SingleWrapper

_STEPWISE = (KLPenaltyVectorEnv, PreviewRewardVectorEnv)


class Statistics(Protocol):
    """Running statistics of the rewards, such as `diffusion_gym.agents.advantages.PromptStatistics`."""

    def normalize(self, prompts: Sequence[str], rewards: NDArray[np.float64]) -> NDArray[np.float64]:
        """Take `rewards` `(N,)` of `prompts` into the statistics and return them normalised, `(N,)`."""
        ...


class PromptNormalizationVectorEnv(EpisodesVectorEnv):
    """The reward of each picture, less the mean of its prompt and divided by its standard deviation.

    Without it an easy prompt teaches more than a hard one. Pictures that end in the same step are normalised together.
    Rewards that are not finite stay so and do not count. The native agents do this themselves.

    Args:
        env: a denoising vector environment, wrapped or not. Wrappers that add rewards before the last step go around
            this one.
        statistics: the running statistics; the caller keeps them, for a checkpoint or for several environments.

    Raises:
        ValueError: `env` has rewards before the last step.
        TypeError: `statistics` has no `normalize`.

    Example:
        >>> import gymnasium as gym, diffusion_gym
        >>> from diffusion_gym.agents.advantages import PromptStatistics
        >>> env = gym.make_vec("DiffusionDenoise-Shapes-Compressibility-v0", num_envs=2, num_inference_steps=1)
        >>> env = PromptNormalizationVectorEnv(env, PromptStatistics(buffer_size=32, min_count=16))
        >>> observation, infos = env.reset(seed=0)
        >>> _, rewards, *_ = env.step(observation["latents"])
        >>> sorted(rewards.round(decimals=3).tolist())  # by their batch, as long as there are fewer than min_count
        [-1.0, 1.0]
    """

    def __init__(self, env: VectorEnv[Any, Any, Any], statistics: Statistics) -> None:
        _check(env, statistics)
        super().__init__(env)
        self.statistics = statistics

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """As the wrapped environment's, with normalised rewards for the pictures that are finished."""
        observation, rewards, terminations, truncations, infos = super().step(actions)
        ended = self.events.ended
        if ended.any():
            prompts = infos.get("final_info", infos)["prompt"][ended]
            values = torch.as_tensor(rewards).cpu().double().numpy().copy()
            values[ended] = normalized(self.statistics, prompts.tolist(), values[ended])
            rewards = like(torch.from_numpy(values), rewards)
        return observation, rewards, terminations, truncations, infos


class PromptNormalization(SingleWrapper[PromptNormalizationVectorEnv]):
    """`PromptNormalizationVectorEnv` for a single environment.

    Every picture is a batch of one, so that rewards are 0 until a prompt has statistics of its own.
    """

    kind = PromptNormalizationVectorEnv


def normalized(statistics: Statistics, prompts: Sequence[str], rewards: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rewards `(N,)` normalised by `statistics`; those that are not finite stay as they are and do not count."""
    usable = np.isfinite(rewards)
    result = rewards.copy()
    if usable.any():
        known = [prompt for prompt, good in zip(prompts, usable, strict=True) if good]
        result[usable] = statistics.normalize(known, rewards[usable])
    return result


def _check(env: Any, statistics: Any) -> None:
    if not callable(getattr(statistics, "normalize", None)):
        raise TypeError(
            f"statistics={statistics!r} has no normalize(prompts, rewards); "
            "diffusion_gym.agents.advantages.PromptStatistics() has"
        )
    inner = env
    while inner is not None:
        if isinstance(inner, _STEPWISE):
            name = type(inner).__name__.removesuffix("VectorEnv")
            raise ValueError(f"env={env!r} has rewards before the last step; put {name} around the normalisation")
        inner = getattr(inner, "vector", None) or getattr(inner, "env", None)  # a single one is the view of `vector`
