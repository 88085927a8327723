"""What the policy gradients have in common: groups, advantages, minibatches over all time steps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from diffusion_gym.agents.advantages import PromptStatistics, batch_normalize, group_normalize
from diffusion_gym.agents.algorithms.base import Agent, AgentConfig, AgentState
from diffusion_gym.agents.algorithms.metrics import Metrics, update_metrics
from diffusion_gym.agents.optimization import Losses
from diffusion_gym.agents.policy import DenoisingPolicy
from diffusion_gym.agents.processes import Processes
from diffusion_gym.agents.renoising import fresh_noise, renoised_transitions
from diffusion_gym.agents.rollout import Trajectories, collect_many
from diffusion_gym.scheduling import StepTable

Normalization = Literal["prompt", "batch", "group", "none"]


@dataclass(frozen=True)
class PolicyGradientConfig(AgentConfig):
    """Options of the policy-gradient agents."""

    normalization: Normalization = "prompt"
    """What rewards are normalised by to give advantages: each prompt's running statistics, the batch, the group of
    samples that share a prompt (GRPO), or nothing."""
    group_size: int = 1
    """Samples in a row that share a prompt; with `normalization=group`, the group."""
    statistics_buffer: int = 32
    """Rewards kept a prompt for its running statistics."""
    statistics_min_count: int = 16
    """Rewards a prompt needs before its own statistics are used; until then the batch's are."""
    advantage_clip: float = 5.0
    """Advantages are clipped to +- this."""
    batch_size: int = 64
    """Trajectories behind one gradient update; gradients are accumulated over all their time steps."""
    inner_epochs: int = 1
    """Passes over the trajectories of an iteration."""
    renoise: bool = False
    """Train on the finished pictures noised anew, with new noise in each pass, in place of the transitions that were
    sampled (after AWM): less noise in the gradient of the noisy steps, more in that of the last ones, so it goes with
    trained_steps 0 0.5; one more forward pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("advantage_clip", "group_size", "batch_size", "inner_epochs"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be larger than 0")
        if self.normalization not in ("prompt", "batch", "group", "none"):
            raise ValueError(f"normalization={self.normalization!r} must be one of prompt, batch, group, none")
        if self.normalization == "group" and self.group_size < 2:
            raise ValueError(f"normalization='group' needs group_size={self.group_size!r} to be at least 2")


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
        """The transitions at `pairs` (sample, step), int64 `(M, 2)`; advantages `(N,)` are those of the samples."""
        samples, steps = pairs.unbind(1)
        return cls(
            trajectories.states(samples, steps),
            trajectories.actions(samples, steps),
            trajectories.log_probs[steps, samples],
            advantages[samples],
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
        self.statistics = PromptStatistics(config.statistics_buffer, config.statistics_min_count)

    @abstractmethod
    def losses(self, batch: Transitions) -> Losses:
        """What to minimise for M transitions, `loss` `(M,)`, and other entries `(M,)` for the metrics."""

    def sample(self, env: VectorEnv[Any, Any, Any], number: int, seed_path: tuple[int, ...]) -> Trajectories:
        """Trajectories in which each prompt is drawn for `group_size` samples; see `Agent.sample`."""
        group = self.config.group_size
        return collect_many(env, self.policy, number, seed_path, group_size=group, processes=self.processes)

    def advantages(self, trajectories: Trajectories) -> np.ndarray:
        """Normalised rewards `(N,)`, clipped; see `normalized_rewards`."""
        bound = self.config.advantage_clip
        return np.clip(self.normalized_rewards(trajectories), -bound, bound)

    def normalized_rewards(self, trajectories: Trajectories) -> np.ndarray:
        """Normalised rewards `(N,)` of all processes' trajectories; NaN for the samples whose reward failed.

        Raises:
            NoUsableReward: no reward is finite.
        """
        prompts, rewards = self.rewards(trajectories)
        usable = np.isfinite(rewards)
        advantages = np.full(len(rewards), np.nan)
        kind = self.config.normalization
        if kind == "prompt":
            known = [prompt for prompt, good in zip(prompts, usable, strict=True) if good]
            advantages[usable] = self.statistics.normalize(known, rewards[usable])
        elif kind == "batch":
            advantages[usable] = batch_normalize(rewards[usable])
        elif kind == "group":
            advantages = group_normalize(rewards, self.config.group_size)
        else:
            advantages[usable] = rewards[usable]
        return advantages

    def update(self, trajectories: Trajectories, rng: np.random.Generator) -> Metrics:
        """Minibatch updates on one iteration's trajectories; see `Agent.update`."""
        advantages = self.advantages(trajectories)
        usable = np.flatnonzero(np.isfinite(advantages))
        size = self.minibatch(len(usable))
        own = self.own(advantages, trajectories)
        minibatches = [
            self.transitions(order[start : start + size], rng)
            for order in (rng.permutation(usable) for _ in range(self.config.inner_epochs))
            for start in range(0, len(order), size)
        ]
        updates = (
            self._renoised(trajectories, own, minibatches, rng)
            if self.config.renoise
            else self._sampled(trajectories, own, minibatches)
        )
        rows = [self._step(*update) for update in updates]
        return {**update_metrics(rows), "samples_dropped": len(advantages) - len(usable)}

    def _step(
        self, items: torch.Tensor, made: Callable[[torch.Tensor], Transitions], count: int
    ) -> dict[str, torch.Tensor]:
        """One gradient step on the transitions that are made of the items."""
        return self.minimize(items, lambda part: self.losses(made(part)), count)

    def _sampled(
        self, trajectories: Trajectories, own: torch.Tensor, minibatches: list[torch.Tensor]
    ) -> Iterator[_Update]:
        """Updates on the transitions that were sampled, at pairs (sample, step)."""
        for pairs in minibatches:
            yield self.local(pairs, len(trajectories)), partial(Transitions.at, trajectories, own), len(pairs)

    def _renoised(
        self, trajectories: Trajectories, own: torch.Tensor, minibatches: list[torch.Tensor], rng: np.random.Generator
    ) -> Iterator[_Update]:
        """Updates on the finished pictures of such pairs, noised anew; the noise is drawn twice, not kept."""
        made, planned = partial(Transitions.renoised, self.policy.table, trajectories, own), []
        for pairs in minibatches:  # before the first update: all ratios are to the policy that sampled
            items = self.local(torch.cat([pairs, torch.arange(len(pairs))[:, None]], 1), len(trajectories))
            seed = int(rng.integers(2**62))
            eps = fresh_noise(trajectories, len(pairs), seed)
            old = eps.new_zeros(len(pairs))
            old[items[:, 2]] = self.optimizer.evaluate(items, partial(self._log_probs, partial(made, eps, old)))
            planned.append((items, seed, old))
        for items, seed, old in planned:
            yield items, partial(made, fresh_noise(trajectories, len(old), seed), old), len(old)

    def _log_probs(self, made: Callable[[torch.Tensor], Transitions], items: torch.Tensor) -> torch.Tensor:
        """Log-probabilities `(M,)` of the transitions that are made of the items."""
        batch = made(items)
        return self.policy(batch.observation, batch.action)

    def minibatch(self, usable: int) -> int:
        """Trajectories behind one update, of `usable` ones."""
        return self.config.batch_size

    def state(self) -> dict[str, Any]:
        """The per-prompt statistics too."""
        return {**super().state(), "prompt_statistics": self.statistics.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` gave."""
        super().load_state(state)
        self.statistics.load(state["prompt_statistics"])
