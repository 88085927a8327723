"""Rewards on the way: the reward's change on the denoised estimate of x_0 (thesis, section 4.2, as shaping)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from diffusion_gym.models import DenoisingModel
from diffusion_gym.prompts import PromptSet
from diffusion_gym.rewards import Reward, evaluate
from diffusion_gym.wrappers.episodes import EpisodesVectorEnv, Mask, like, require_states, rows, with_info
from diffusion_gym.wrappers.single import SingleWrapper


class Denoiser(Protocol):
    """Foresees the picture, as `diffusion_gym.agents.DenoisingPolicy` does."""

    def denoised(self, observation: Mapping[str, Any]) -> torch.Tensor:
        """The estimate of x_0 `(N, C, H, W)` in N states."""
        ...


class PreviewRewardVectorEnv(EpisodesVectorEnv):
    """Rewards r_t + Phi(s_{t+1}) - Phi(s_t), with Phi(s) = r(x0~(s), c) and Phi = 0 at the end.

    The noisy x_t says little about the reward, its denoised estimate x0~ does (thesis, section 4.2). As
    potential-based shaping with gamma = 1 (Ng et al., 1999) it changes no optimum: the return is that of the picture
    less Phi(s_0), which no action changes. It helps algorithms that learn from single steps (a critic, GAE with
    lambda < 1); the native agents, which use the whole return, gain nothing. Each trajectory costs up to
    T / every more reward queries and predictions. `info["preview"]` has Phi where it was computed.

    Args:
        env: a denoising vector environment, wrapped or not, that shows its states.
        denoiser: predicts x_0; may change in training, for each Phi is computed once and used twice.
        every: steps from one preview to the next; in between Phi stays as it is.

    Raises:
        ValueError: `env` is no denoising environment or shows no states, or `every` is less than 1.
        TypeError: `denoiser` has no `denoised`.

    Example:
        >>> import gymnasium as gym, diffusion_gym
        >>> from diffusion_gym.agents import DenoisingPolicy
        >>> env = gym.make_vec("DiffusionDenoise-Shapes-Color-v0", num_envs=2, num_inference_steps=2)
        >>> policy = DenoisingPolicy.from_env(env)
        >>> env = PreviewRewardVectorEnv(env, policy)
        >>> observation, infos = env.reset(seed=0)
        >>> first = infos["preview"]
        >>> observation, rewards, *_, infos = env.step(policy.distribution(observation).sample())
        >>> bool((rewards == infos["preview"] - first).all())
        True
    """

    def __init__(self, env: VectorEnv[Any, Any, Any], denoiser: Denoiser, every: int = 1) -> None:
        require_states(env, "PreviewReward")
        if not isinstance(every, int | np.integer) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every={every!r} must be a whole number of at least 1")
        if not callable(getattr(denoiser, "denoised", None)):
            raise TypeError(f"denoiser={denoiser!r} has no denoised(observation); DenoisingPolicy.from_env(env) has")
        base: Any = env.unwrapped
        if not hasattr(base, "step_table"):
            raise ValueError(f"env={env!r} is not made by gym.make_vec or gym.make('DiffusionDenoise-...')")
        super().__init__(env)
        self._model: DenoisingModel = base.model
        self._reward: Reward = base.reward
        self._prompt_set: PromptSet = base.prompt_set
        self._denoiser, self._every = denoiser, int(every)
        self._age = np.zeros(env.num_envs, dtype=np.int64)
        self._potential = torch.zeros(env.num_envs, device=base.device)
        self._due: Mask = np.zeros(env.num_envs, dtype=bool)  # for whom the last call computed Phi

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As the wrapped environment's; `info["preview"]` has Phi(s_0)."""
        observation, infos = super().reset(seed=seed, options=options)
        self._shaping(observation, infos["prompt"])
        return observation, self._with_preview(infos, observation["latents"])

    def step(self, actions: Any) -> tuple[dict[str, Any], Any, Any, Any, dict[str, Any]]:
        """As the wrapped environment's, with the change of Phi in the rewards."""
        observation, rewards, terminations, truncations, infos = super().step(actions)
        change = like(self._shaping(observation, infos["prompt"]), rewards)
        return observation, rewards + change, terminations, truncations, self._with_preview(infos, rewards)

    def _with_preview(self, infos: dict[str, Any], container: Any) -> dict[str, Any]:
        if not self._due.any():
            return infos
        shown = torch.where(self._on_device(self._due), self._potential, 0.0)
        return with_info(infos, "preview", like(shown, container), self._due)

    @torch.no_grad()
    def _shaping(self, observation: Mapping[str, Any], prompts: Sequence[str]) -> torch.Tensor:
        """Go on to the states of `observation`, and give Phi(s') - Phi(s) of the episodes that moved, `(N,)`.

        Args:
            observation: the states s', those of new episodes where one has begun.
            prompts: their prompts.
        """
        events = self.events
        self._age[events.moved] += 1
        self._age[events.begun] = 0
        self._due = events.begun | (events.moved & ~events.ended & (self._age % self._every == 0))
        before = self._potential
        over = self._on_device(events.ended | events.begun)
        self._potential = self._previewed(observation, prompts, torch.where(over, 0.0, before))
        after = torch.where(self._on_device(events.ended), 0.0, self._potential)
        return torch.where(self._on_device(events.moved), after - before, 0.0)

    def _previewed(self, observation: Mapping[str, Any], prompts: Sequence[str], last: torch.Tensor) -> torch.Tensor:
        """`last` with a new Phi where one is due."""
        if not self._due.any():
            return last
        index = np.flatnonzero(self._due)
        x0 = self._denoiser.denoised(rows(observation, self._due))
        images = self._model.decode(x0.to(last.device))
        asked = [str(prompts[each]) for each in index.tolist()]
        scores = evaluate(self._reward, images, asked, self._prompt_set.metadata_of(asked)).scores.to(last.device)
        place = torch.from_numpy(index).to(last.device)
        # A preview that cannot be scored changes nothing: a NaN would spoil the whole episode.
        return last.index_copy(0, place, torch.where(scores.isfinite(), scores, last[place]))

    def _on_device(self, mask: Mask) -> torch.Tensor:
        return torch.from_numpy(mask).to(self._potential.device)


class PreviewReward(SingleWrapper[PreviewRewardVectorEnv]):
    """`PreviewRewardVectorEnv` for a single environment."""

    kind = PreviewRewardVectorEnv
