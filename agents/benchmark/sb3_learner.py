"""Stable-Baselines3's algorithms in a benchmark."""

from __future__ import annotations

from typing import Any

from gymnasium.wrappers.vector import ClipReward

from diffusion_gym.agents.advantages import PromptStatistics
from diffusion_gym.agents.benchmark.learner import SEED_STRIDE, LibraryLearner
from diffusion_gym.agents.sb3 import DDPOPPO, ddpo_is, ddpo_sf
from diffusion_gym.agents.training.settings import RunSettings
from diffusion_gym.wrappers import PromptNormalizationVectorEnv


class SB3Learner(LibraryLearner):
    """SB3's own PPO and A2C, what they lack coming from wrappers and their rollout buffer; and `DDPOPPO`.

    Args:
        kind: `ppo`, `a2c` or `ddpo_ppo`.
        settings: of `ddpo_is`, of `ddpo_sf` for A2C.

    Raises:
        ValueError: an option that SB3's algorithm does not have.
    """

    def __init__(self, kind: str, settings: RunSettings) -> None:
        super().__init__(settings)
        self._model: Any = {"ppo": self._ppo, "a2c": self._a2c, "ddpo_ppo": self._ddpo_ppo}[kind]()
        self.policy = self._model.policy.actor

    def train_until(self, reward_queries: int) -> None:
        """Go on with the same rollouts, optimiser and statistics."""
        missing = reward_queries - self.reward_queries
        self._model.learn(missing * self.horizon, reset_num_timesteps=False)

    def _ppo(self) -> Any:
        arguments = {"batch_size": self.transitions, "n_epochs": self.options.inner_epochs, **self.chosen("clip_range")}
        return ddpo_is(self._normalized(), **arguments, **self._of_sb3(), **self._shared(self._micro_batch()))

    def _a2c(self) -> Any:
        if self.options.inner_epochs != 1:
            raise ValueError("inner_epochs must be 1 for sb3/a2c: A2C updates once on each rollout")
        return ddpo_sf(self._normalized(), **self._of_sb3(), **self._shared(self._micro_batch()))

    def _ddpo_ppo(self) -> Any:
        names = ("trained_steps", "statistics_buffer", "statistics_min_count", "advantage_clip", "normalization")
        arguments = {**self.chosen("clip_range", *names), **self._micro_batch(), "n_epochs": self.options.inner_epochs}
        size = self.options.batch_size * self.horizon
        return DDPOPPO("CFGUNetPolicy", self.env, batch_size=size, **arguments, **self._shared({}))

    def _normalized(self) -> Any:
        """The environment of SB3's own algorithms, which know no prompts."""
        options = self.options
        if options.normalization != "prompt":
            return self.env
        statistics = PromptStatistics(options.statistics_buffer, options.statistics_min_count)
        normalized = PromptNormalizationVectorEnv(self.env, statistics)
        return ClipReward(normalized, -options.advantage_clip, options.advantage_clip)

    def _of_sb3(self) -> dict[str, Any]:
        return {**self.chosen("trained_steps"), "normalize_advantage": self.options.normalization == "batch"}

    def _micro_batch(self) -> dict[str, Any]:
        size = self.options.micro_batch_size
        return {"micro_batch_size": size} if size else {}  # 0 is automatic for native agents alone

    def _shared(self, micro_batch: dict[str, Any]) -> dict[str, Any]:
        options = {**self.options.trained_part, **self.options.computation}
        return {
            "n_steps": self.settings.samples_per_iteration // self.env.num_envs * self.horizon,
            "seed": SEED_STRIDE * self.settings.seed,
            **self.chosen("learning_rate", "max_grad_norm"),
            "policy_kwargs": {**options, "optimizer_kwargs": self.options.adamw, **micro_batch},
        }
