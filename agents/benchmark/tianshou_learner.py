"""Tianshou's algorithms in a benchmark."""

from __future__ import annotations

from typing import Any

import numpy as np
from tianshou.trainer import OnPolicyTrainerParams

from diffusion_gym.agents.benchmark.learner import SEED_STRIDE, LibraryLearner
from diffusion_gym.agents.tianshou import AdamWFactory, GuidedPolicy, TrajectoryCollector, ddpo_is, ddpo_sf
from diffusion_gym.agents.training.settings import RunSettings


class TianshouLearner(LibraryLearner):
    """Tianshou's PPO and Reinforce with its trainer; rewards are normalised as `DDPOPPO` and `DDPOReinforce` do.

    Args:
        kind: `ppo` or `reinforce`.
        settings: of `ddpo_is`, of `ddpo_sf` for Reinforce.

    Raises:
        ValueError: an option that Tianshou's algorithm does not have.
    """

    def __init__(self, kind: str, settings: RunSettings) -> None:
        super().__init__(settings)
        np.random.seed(settings.seed)  # the order of its minibatches
        algorithm: Any = self._ppo() if kind == "ppo" else self._reinforce()
        self.policy = algorithm.policy.denoising
        samples = settings.samples_per_iteration
        collector: Any = TrajectoryCollector(algorithm, self.env, samples)
        collector.env.seed(SEED_STRIDE * settings.seed)
        params = OnPolicyTrainerParams(
            training_collector=collector,
            collection_step_num_env_steps=None,
            collection_step_num_episodes=samples,
            batch_size=self.transitions if kind == "ppo" else None,
            update_step_num_repetitions=self.options.inner_epochs,
            epoch_num_steps=samples * self.horizon,
            max_epochs=settings.total_reward_queries // samples,
            show_progress=False,
        )
        self._trainer: Any = algorithm.create_trainer(params)
        self._begun = False

    def train_until(self, reward_queries: int) -> None:
        """Epochs of the trainer; one is an iteration."""
        if not self._begun:
            self._trainer.reset()
            self._begun = True
        while self.reward_queries < reward_queries:
            self._trainer.execute_epoch()

    def _ppo(self) -> Any:
        return ddpo_is(self.env, self._policy(), eps_clip=self.options.clip_range, **self._shared())

    def _reinforce(self) -> Any:
        return ddpo_sf(self.env, self._policy(), **self._shared())

    def _policy(self) -> GuidedPolicy:
        options = {**self.options.trained_part, **self.options.computation}
        return GuidedPolicy.from_env(self.env, **options, **self.chosen("micro_batch_size"))

    def _shared(self) -> dict[str, Any]:
        names = ("normalization", "trained_steps", "statistics_buffer", "statistics_min_count", "advantage_clip")
        return {"optim": AdamWFactory(self.options), **self.chosen("max_grad_norm", *names)}
