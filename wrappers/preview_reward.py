"""Rewards on the way: the reward's change on the denoised estimate of x_0 (thesis, section 4.2, as shaping)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import VectorEnv, VectorWrapper

from diffusion_gym.models import DenoisingModel
from diffusion_gym.prompts import PromptSet
from diffusion_gym.rewards import Reward, evaluate
from diffusion_gym.wrappers.episodes import (
    Episodes,
    Events,
    Mask,
    as_mask,
    batched,
    like,
    require_states,
    rows,
    with_info,
)


class Denoiser(Protocol):
    """Foresees the picture, as `diffusion_gym.agents.DenoisingPolicy` does."""

    def denoised(self, observation: Mapping[str, Any]) -> torch.Tensor:
        """The estimate of x_0 `(N, C, H, W)` in N states."""
        ...


class PreviewRewardVectorEnv(VectorWrapper):
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
        self._shaping = Shaping(env, denoiser, every, env.num_envs)
        super().__init__(env)
        self._episodes = Episodes(env)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As the wrapped environment's; `info["preview"]` has Phi(s_0)."""
        inner: Any = self.env  # Gymnasium's type leaves out lists of seeds
        observation, infos = inner.reset(seed=seed, options=options)
        events = self._episodes.reset(as_mask(infos["_prompt"]))
        self._shaping.update(observation, infos["prompt"], events)
        return observation, self._told(infos, observation["latents"])

    def step(self, actions: Any) -> tuple[dict[str, Any], Any, Any, Any, dict[str, Any]]:
        """As the wrapped environment's, with the change of Phi in the rewards."""
        observation, rewards, terminations, truncations, infos = self.env.step(actions)
        events = self._episodes.step(terminations, truncations)
        change = self._shaping.update(observation, infos["prompt"], events)
        return observation, rewards + like(change, rewards), terminations, truncations, self._told(infos, rewards)

    def _told(self, infos: dict[str, Any], container: Any) -> dict[str, Any]:
        due = self._shaping.due
        return with_info(infos, "preview", like(self._shaping.shown(), container), due) if due.any() else infos


class PreviewReward(gym.Wrapper[Any, Any, Any, Any]):
    """The same for a single environment; arguments and errors as `PreviewRewardVectorEnv`.

    Example:
        >>> import gymnasium as gym, diffusion_gym
        >>> from diffusion_gym.agents import DenoisingPolicy
        >>> env = gym.make("DiffusionDenoise-Shapes-Color-v0", num_inference_steps=2)
        >>> env = PreviewReward(env, DenoisingPolicy.from_env(env))
        >>> observation, info = env.reset(seed=0)
        >>> 0 <= info["preview"] <= 1
        True
    """

    def __init__(self, env: gym.Env[Any, Any], denoiser: Denoiser, every: int = 1) -> None:
        self._shaping = Shaping(env, denoiser, every, 1)
        super().__init__(env)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As the wrapped environment's; `info["preview"]` has Phi(s_0)."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._update(observation, info, moved=False, ended=False)
        return observation, self._told(info)

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """As the wrapped environment's, with the change of Phi in the reward."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        change = self._update(observation, info, moved=True, ended=terminated or truncated)
        return observation, float(reward) + change, terminated, truncated, self._told(info)

    def _update(self, observation: dict[str, Any], info: dict[str, Any], *, moved: bool, ended: bool) -> float:
        events = Events(np.array([moved]), np.array([ended]), np.array([not moved]))
        return float(self._shaping.update(batched(observation), [info["prompt"]], events)[0])

    def _told(self, info: dict[str, Any]) -> dict[str, Any]:
        return {**info, "preview": float(self._shaping.shown()[0])} if self._shaping.due.any() else info


class Shaping:
    """Phi of N episodes, and how it changes.

    Args:
        env: the environment, which has the reward and decodes pictures.
        denoiser: predicts x_0.
        every: steps from one preview to the next.
        number: N.

    Attributes:
        due: for which episodes the last call computed Phi, bool `(N,)`.
    """

    def __init__(self, env: Any, denoiser: Denoiser, every: int, number: int) -> None:
        require_states(env, "PreviewReward")
        if not isinstance(every, int | np.integer) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every={every!r} must be a whole number of at least 1")
        if not callable(getattr(denoiser, "denoised", None)):
            raise TypeError(f"denoiser={denoiser!r} has no denoised(observation); DenoisingPolicy.from_env(env) has")
        base = getattr(env.unwrapped, "vector", env.unwrapped)
        if not hasattr(base, "step_table"):
            raise ValueError(f"env={env!r} is not made by gym.make_vec or gym.make('DiffusionDenoise-...')")
        self._model: DenoisingModel = base.model
        self._reward: Reward = base.reward
        self._prompt_set: PromptSet = base.prompt_set
        self._denoiser, self._every = denoiser, int(every)
        self._age = np.zeros(number, dtype=np.int64)
        self._potential = torch.zeros(number, device=base.device)
        self.due: Mask = np.zeros(number, dtype=bool)

    def shown(self) -> torch.Tensor:
        """Phi where the last call computed it, 0 elsewhere: float32 `(N,)`."""
        return torch.where(self._on_device(self.due), self._potential, 0.0)

    @torch.no_grad()
    def update(self, observation: Mapping[str, Any], prompts: Sequence[str], events: Events) -> torch.Tensor:
        """Go on to the states of `observation`, and give Phi(s') - Phi(s) of the episodes that moved, `(N,)`.

        Args:
            observation: the states s', those of new episodes where one has begun.
            prompts: their prompts.
            events: what the call did that returned them.
        """
        self._age[events.moved] += 1
        self._age[events.begun] = 0
        self.due = events.begun | (events.moved & ~events.ended & (self._age % self._every == 0))
        before = self._potential
        over = self._on_device(events.ended | events.begun)
        self._potential = self._previewed(observation, prompts, torch.where(over, 0.0, before))
        after = torch.where(self._on_device(events.ended), 0.0, self._potential)
        return torch.where(self._on_device(events.moved), after - before, 0.0)

    def _previewed(self, observation: Mapping[str, Any], prompts: Sequence[str], last: torch.Tensor) -> torch.Tensor:
        """`last` with a new Phi where one is due."""
        if not self.due.any():
            return last
        index = np.flatnonzero(self.due)
        x0 = self._denoiser.denoised(rows(observation, self.due))
        images = self._model.decode(x0.to(last.device))
        asked = [str(prompts[each]) for each in index.tolist()]
        scores = evaluate(self._reward, images, asked, self._prompt_set.metadata_of(asked)).scores.to(last.device)
        place = torch.from_numpy(index).to(last.device)
        # A preview that cannot be scored changes nothing: a NaN would spoil the whole episode.
        return last.index_copy(0, place, torch.where(scores.isfinite(), scores, last[place]))

    def _on_device(self, mask: Mask) -> torch.Tensor:
        return torch.from_numpy(mask).to(self._potential.device)
