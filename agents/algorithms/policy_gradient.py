"""What the policy gradients have in common: groups, advantages, minibatches over all time steps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from diffusion_gym.agents.advantages import AdvantageOptions, RewardNormalizer
from diffusion_gym.agents.algorithms.base import Agent, AgentConfig, AgentState
from diffusion_gym.agents.algorithms.metrics import Metrics, update_metrics
from diffusion_gym.agents.finite import require
from diffusion_gym.agents.noise_window import NoiseWindowOptions, window_at, window_places
from diffusion_gym.agents.optimization import Losses
from diffusion_gym.agents.policy import DenoisingPolicy
from diffusion_gym.agents.processes import Processes
from diffusion_gym.agents.renoising import fresh_noise, renoised_transitions
from diffusion_gym.agents.rollout import Trajectories, collect_many, trained_steps
from diffusion_gym.agents.solver import RolloutOptions, solver_of
from diffusion_gym.scheduling import StepTable
from diffusion_gym.wrappers.one_step import OneStepVectorEnv


@dataclass(frozen=True)
class PolicyGradientConfig(AdvantageOptions, NoiseWindowOptions, RolloutOptions, AgentConfig):
    """Options of the policy-gradient agents."""

    batch_size: int = 64
    """Trajectories behind one gradient update; gradients are accumulated over all their time steps."""
    inner_epochs: int = 1
    """Passes over the trajectories of an iteration."""
    shared_noise: bool = False
    """Begin all samples of a group from the same noise x_T (DanceGRPO)."""
    renoise: bool = False
    """Train on the finished pictures noised anew, with new noise in each pass, in place of the transitions that were
    sampled (after AWM): less noise in the gradient of the noisy steps, more in that of the last ones, so it goes with
    trained_steps 0 0.5; one more forward pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "larger than 0", "batch_size", "inner_epochs")
        if self.shared_noise and self.group_size < 2:
            raise ValueError(f"shared_noise=True needs group_size={self.group_size!r} to be at least 2")
        if self.rollout_scheduler is not None and not self.renoise:
            raise ValueError(
                f"rollout_scheduler={self.rollout_scheduler!r} gives no log-probabilities, which this agent needs; "
                "take renoise=True with it, or leave it out"
            )


@dataclass(frozen=True)
class Transitions:
    """M transitions of an update, which come from any trajectories and steps.

    Attributes:
        observation: the states, as `DenoisingPolicy.distribution` takes them.
        action: x_{t-1}, float32 `(M, C, H, W)`.
        old_log_prob: log-probabilities under the policy that sampled them, `(M,)`.
        advantage: `(M,)`.
    """

    observation: dict[str, torch.Tensor]
    action: torch.Tensor
    old_log_prob: torch.Tensor
    advantage: torch.Tensor

    @classmethod
    def at(cls, trajectories: Trajectories, advantages: torch.Tensor, pairs: torch.Tensor) -> Transitions:
        """The transitions at `pairs` (sample, step), int64 `(M, 2)`; advantages are `(N,)`, or `(T, N)` a step."""
        samples, steps = pairs.unbind(1)
        return cls(
            trajectories.states(samples, steps),
            trajectories.actions(samples, steps),
            trajectories.log_probs[steps, samples],
            advantages.expand_as(trajectories.log_probs)[steps, samples],
        )

    @classmethod
    def renoised(
        cls,
        table: StepTable,
        trajectories: Trajectories,
        advantages: torch.Tensor,
        eps: torch.Tensor,
        old_log_probs: torch.Tensor,
        items: torch.Tensor,
    ) -> Transitions:
        """Transitions of finished pictures noised anew; see `renoised_transitions`.

        Args:
            table: the sampler's step table.
            trajectories: whose pictures they are.
            advantages: of the samples, `(N,)`.
            eps: the noise of a minibatch, `(B, C, H, W)`.
            old_log_probs: its log-probabilities under the policy that sampled, `(B,)`.
            items: (sample, step, place in the minibatch) of each transition, int64 `(M, 3)`.
        """
        samples, steps, rows = items.unbind(1)
        observation, action = renoised_transitions(table, trajectories, samples, steps, eps[rows])
        return cls(observation, action, old_log_probs[rows], advantages[samples])


# This process's items of an update, what makes transitions of some of them, and how many items all processes have.
_Update = tuple[torch.Tensor, Callable[[torch.Tensor], Transitions], int]


class PolicyGradientState(AgentState):
    """The rewards behind each prompt's statistics too."""

    prompt_statistics: dict[str, list[float]]


class PolicyGradientAgent(Agent):
    """Gradient steps on the loss of a subclass, over minibatches of whole trajectories."""

    Config: ClassVar[type[AgentConfig]] = PolicyGradientConfig
    State: ClassVar[type[AgentState]] = PolicyGradientState
    config: PolicyGradientConfig

    def __init__(
        self, policy: DenoisingPolicy, config: PolicyGradientConfig, processes: Processes | None = None
    ) -> None:
        super().__init__(policy, config, processes)
        self.normalizer, self.solver = RewardNormalizer(config), solver_of(policy, config)
        whole = policy.model.step_table(replace(policy.config, noisy_steps=None))
        self._places = window_places(config, policy.config.noisy_steps, trained_steps(whole, config.trained_steps))

    @abstractmethod
    def losses(self, batch: Transitions) -> Losses:
        """What to minimise for M transitions, `loss` `(M,)`, and other entries `(M,)` for the metrics."""

    def sample(self, env: VectorEnv[Any, Any, Any], number: int, seed_path: tuple[int, ...]) -> Trajectories:
        """Trajectories in which each prompt is drawn for `group_size` samples; see `Agent.sample`.

        With a `rollout_scheduler` they are finished latents only.
        """
        return collect_many(
            env if self.solver is None else OneStepVectorEnv(env),
            self.policy,
            number,
            seed_path,
            group_size=self.config.group_size,
            shared_noise=self.config.shared_noise,
            solver=self.solver,
            processes=self.processes,
        )

    @contextmanager
    def noise_window(self, seed_path: tuple[int, ...]) -> Iterator[None]:
        """The window of noisy steps where the options have it in this iteration; see `Agent.noise_window`."""
        if not self._places:
            yield
            return
        own = self.steps
        with self.policy.noisy_within(window_at(self.config, self._places, seed_path)):
            self.steps = trained_steps(self.policy.table, self.config.trained_steps)
            try:
                yield
            finally:
                self.steps = own

    def advantages(self, trajectories: Trajectories) -> np.ndarray:
        """Normalised rewards `(N,)`, clipped; see `normalized_rewards`. `(T, N)` gives each step one of its own."""
        return self.normalizer.clip(self.normalized_rewards(trajectories))

    def normalized_rewards(self, trajectories: Trajectories) -> np.ndarray:
        """Normalised rewards `(N,)` of all processes' trajectories; NaN for the samples whose reward failed.

        Raises:
            NoUsableReward: no reward is finite.
        """
        return self.normalizer.normalize(*self.rewards(trajectories))

    def update(self, trajectories: Trajectories, rng: np.random.Generator) -> Metrics:
        """Minibatch updates on one iteration's trajectories; see `Agent.update`."""
        advantages = self.advantages(trajectories)
        finite = np.isfinite(advantages)
        usable = np.flatnonzero(finite if finite.ndim == 1 else finite.all(0))
        size = self.minibatch(len(usable))
        local = self.local_values(advantages, trajectories)
        minibatches = [
            self.transitions(order[start : start + size], rng)
            for order in (rng.permutation(usable) for _ in range(self.config.inner_epochs))
            for start in range(0, len(order), size)
        ]
        updates = (
            self._renoised(trajectories, local, minibatches, rng)
            if self.config.renoise
            else self._sampled(trajectories, local, minibatches)
        )
        rows: list[dict[str, torch.Tensor]] = []
        for update in updates:
            rows.append(self._step(*update))
            if self.finished(rows[-1]):
                break
        return {**update_metrics(rows), "samples_dropped": finite.shape[-1] - len(usable)}

    def finished(self, means: Losses) -> bool:
        """Whether the update with these means ends the iteration before its other minibatches."""
        return False

    def _step(
        self, items: torch.Tensor, transitions_at: Callable[[torch.Tensor], Transitions], count: int
    ) -> dict[str, torch.Tensor]:
        """One gradient step on the transitions that are made of the items."""
        return self.minimize(items, lambda part: self.losses(transitions_at(part)), count)

    def _sampled(
        self, trajectories: Trajectories, advantages: torch.Tensor, minibatches: list[torch.Tensor]
    ) -> Iterator[_Update]:
        """Updates on the transitions that were sampled, at pairs (sample, step)."""
        for pairs in minibatches:
            yield self.local(pairs, len(trajectories)), partial(Transitions.at, trajectories, advantages), len(pairs)

    def _renoised(
        self,
        trajectories: Trajectories,
        advantages: torch.Tensor,
        minibatches: list[torch.Tensor],
        rng: np.random.Generator,
    ) -> Iterator[_Update]:
        """Updates on the finished pictures of such pairs, noised anew; the noise is drawn twice, not stored."""
        transitions_at, planned = partial(Transitions.renoised, self.policy.table, trajectories, advantages), []
        for pairs in minibatches:  # before the first update: all ratios are to the policy that sampled
            items = self.local(torch.cat([pairs, torch.arange(len(pairs))[:, None]], 1), len(trajectories))
            seed = int(rng.integers(2**62))
            eps = fresh_noise(trajectories, len(pairs), seed)
            old = eps.new_zeros(len(pairs))
            old[items[:, 2]] = self.optimizer.evaluate(
                items, partial(self._log_probs, partial(transitions_at, eps, old))
            )
            planned.append((items, seed, old))
        for items, seed, old in planned:
            yield items, partial(transitions_at, fresh_noise(trajectories, len(old), seed), old), len(old)

    def _log_probs(self, transitions_at: Callable[[torch.Tensor], Transitions], items: torch.Tensor) -> torch.Tensor:
        """Log-probabilities `(M,)` of the transitions that are made of the items."""
        batch = transitions_at(items)
        return self.policy(batch.observation, batch.action)

    def minibatch(self, usable: int) -> int:
        """Trajectories behind one update, of `usable` ones."""
        return self.config.batch_size

    def state(self) -> dict[str, Any]:
        """The per-prompt statistics too."""
        return {**super().state(), "prompt_statistics": self.normalizer.statistics.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` gave."""
        super().load_state(state)
        self.normalizer.statistics.load(state["prompt_statistics"])
