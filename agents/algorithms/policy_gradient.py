"""What the policy gradients have in common: transitions, of the rollout or of finished pictures noised anew."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
import torch

from diffusion_gym.agents.algorithms.base import AgentConfig
from diffusion_gym.agents.algorithms.minibatch import MinibatchAgent, MinibatchConfig, Update
from diffusion_gym.agents.noise_window import NoiseWindowOptions, window_at, window_places
from diffusion_gym.agents.optimization import Losses
from diffusion_gym.agents.policy import DenoisingPolicy
from diffusion_gym.agents.processes import Processes
from diffusion_gym.agents.renoising import fresh_noise, renoised_transitions
from diffusion_gym.agents.rollout import Trajectories, trained_steps
from diffusion_gym.scheduling import StepTable


@dataclass(frozen=True)
class PolicyGradientConfig(NoiseWindowOptions, MinibatchConfig):
    """Options of the policy-gradient agents."""

    renoise: bool = False
    """Train on the finished pictures noised anew, with new noise in each pass, in place of the transitions that were
    sampled (after AWM): less noise in the gradient of the noisy steps, more in that of the last ones, so it goes with
    trained_steps 0 0.5; one more forward pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
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
        old_mean: means of the policy that sampled, `(M, C, H, W)`, for agents with `compares_means`; None where it is
            the policy that is trained.
    """

    observation: dict[str, torch.Tensor]
    action: torch.Tensor
    old_log_prob: torch.Tensor
    advantage: torch.Tensor
    old_mean: torch.Tensor | None = None

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


class PolicyGradientAgent(MinibatchAgent):
    """Gradient steps on the loss of a subclass, over minibatches of whole trajectories."""

    Config: ClassVar[type[AgentConfig]] = PolicyGradientConfig
    config: PolicyGradientConfig

    def __init__(
        self, policy: DenoisingPolicy, config: PolicyGradientConfig, processes: Processes | None = None
    ) -> None:
        super().__init__(policy, config, processes)
        whole = policy.model.step_table(replace(policy.config, noisy_steps=None))
        self._places = window_places(config, policy.config.noisy_steps, trained_steps(whole, config.trained_steps))

    @property
    def compares_means(self) -> bool:
        """Whether `losses` looks at the means of the policy that sampled."""
        return False

    @abstractmethod
    def losses(self, batch: Transitions) -> Losses:
        """What to minimise for M transitions, `loss` `(M,)`, and other entries `(M,)` for the metrics."""

    def updates(
        self,
        trajectories: Trajectories,
        advantages: torch.Tensor,
        minibatches: list[torch.Tensor],
        rng: np.random.Generator,
    ) -> Iterator[Update]:
        """Updates on the transitions that were sampled or, with `renoise`, on finished pictures noised anew."""
        if self.config.renoise:
            return self._renoised(trajectories, advantages, minibatches, rng)
        return self._sampled(trajectories, advantages, minibatches)

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

    def _losses_at(
        self,
        transitions_at: Callable[[torch.Tensor], Transitions],
        old_means: torch.Tensor | None,
        items: torch.Tensor,
    ) -> Losses:
        """`losses` of the transitions that are made of the items, whose last column is their place in the means."""
        batch = transitions_at(items[:, :-1])
        return self.losses(batch if old_means is None else replace(batch, old_mean=old_means[items[:, -1]]))

    def _planned(
        self, transitions_at: Callable[[torch.Tensor], Transitions], items: torch.Tensor, several: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The items with their places, and the means that the first of several updates begins from, if looked at."""
        means = None
        if several and self.compares_means:
            at = transitions_at
            means = self.optimizer.evaluate(items, lambda part: self.policy.distribution(at(part).observation).mean)
        return torch.cat([items, torch.arange(len(items), device=items.device)[:, None]], dim=1), means

    def _sampled(
        self, trajectories: Trajectories, advantages: torch.Tensor, minibatches: list[torch.Tensor]
    ) -> Iterator[Update]:
        """Updates on the transitions that were sampled, at pairs (sample, step)."""
        at, several = partial(Transitions.at, trajectories, advantages), len(minibatches) > 1
        planned = [self._planned(at, self.local(pairs, len(trajectories)), several) for pairs in minibatches]
        for pairs, (items, means) in zip(minibatches, planned, strict=True):
            yield items, partial(self._losses_at, at, means), len(pairs)

    def _renoised(
        self,
        trajectories: Trajectories,
        advantages: torch.Tensor,
        minibatches: list[torch.Tensor],
        rng: np.random.Generator,
    ) -> Iterator[Update]:
        """Updates on the finished pictures of such pairs, noised anew; the noise is drawn twice, not stored."""
        transitions_at, planned = partial(Transitions.renoised, self.policy.table, trajectories, advantages), []
        for pairs in minibatches:  # before the first update: all ratios are to the policy that sampled
            items = self.local(torch.cat([pairs, torch.arange(len(pairs))[:, None]], 1), len(trajectories))
            seed = int(rng.integers(2**62))
            eps = fresh_noise(trajectories, len(pairs), seed)
            old = eps.new_zeros(len(pairs))
            at = partial(transitions_at, eps, old)
            old[items[:, 2]] = self.optimizer.evaluate(items, partial(self._log_probs, at))
            planned.append((*self._planned(at, items, len(minibatches) > 1), seed, old))
        for items, means, seed, old in planned:
            eps = fresh_noise(trajectories, len(old), seed)
            yield items, partial(self._losses_at, partial(transitions_at, eps, old), means), len(old)

    def _log_probs(self, transitions_at: Callable[[torch.Tensor], Transitions], items: torch.Tensor) -> torch.Tensor:
        """Log-probabilities `(M,)` of the transitions that are made of the items."""
        batch = transitions_at(items)
        return self.policy(batch.observation, batch.action)
