"""What DDPO's policy gradients have in common: advantages, minibatches, accumulation over time steps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from diffusion_gym.agents.advantages import PromptStatistics, batch_normalize
from diffusion_gym.agents.algorithms.base import Agent, AgentConfig, Metrics, NoUsableReward
from diffusion_gym.agents.losses import Surrogate
from diffusion_gym.agents.policy import DenoisingPolicy
from diffusion_gym.agents.rollout import Trajectories


@dataclass(frozen=True)
class PolicyGradientConfig(AgentConfig):
    """Options of the policy-gradient agents."""

    per_prompt: bool = True
    """Normalise rewards by each prompt's running statistics, or else by the batch."""
    statistics_buffer: int = 32
    """Rewards kept a prompt for its running statistics."""
    statistics_min_count: int = 16
    """Rewards a prompt needs before its own statistics are used; until then the batch's are."""
    advantage_clip: float = 5.0
    """Advantages are clipped to +- this."""
    trained_steps: tuple[float, float] = (0.0, 1.0)
    """Part of the trajectory whose steps are trained on, as fractions of T, 0 being the noise and 1 the picture."""

    def __post_init__(self) -> None:
        super().__post_init__()
        first, last = self.trained_steps
        if not 0 <= first < last <= 1:
            raise ValueError(f"trained_steps={self.trained_steps!r} must be two fractions of T, 0 <= first < last <= 1")


class PolicyGradientAgent(Agent):
    """Gradient ascent on the clipped or plain surrogate of a subclass."""

    Config: ClassVar[type[AgentConfig]] = PolicyGradientConfig
    config: PolicyGradientConfig

    def __init__(self, policy: DenoisingPolicy, config: PolicyGradientConfig) -> None:
        super().__init__(policy, config)
        self.statistics = PromptStatistics(config.statistics_buffer, config.statistics_min_count)
        steps, total = policy.stochastic_steps, len(policy.table)  # a deterministic step has no gradient
        first, last = config.trained_steps
        self.steps = steps[(steps >= first * total) & (steps < last * total)]
        if len(self.steps) == 0:
            raise ValueError(f"trained_steps={config.trained_steps!r} leaves no stochastic step of T={total}; widen it")

    @abstractmethod
    def surrogate(self, log_prob: torch.Tensor, old_log_prob: torch.Tensor, advantage: torch.Tensor) -> Surrogate:
        """The loss of M transitions; every argument is `(M,)`."""

    def advantages(self, trajectories: Trajectories) -> np.ndarray:
        """Clipped advantages `(N,)`; NaN for the samples whose reward failed.

        Raises:
            NoUsableReward: no reward is finite.
        """
        rewards = trajectories.rewards.double().cpu().numpy()
        usable = np.isfinite(rewards)
        if not usable.any():
            raise NoUsableReward(f"all {len(rewards)} rewards of the iteration are NaN or infinite; check the reward")
        advantages = np.full(len(rewards), np.nan)
        if self.config.per_prompt:
            prompts = [prompt for prompt, good in zip(trajectories.prompts, usable, strict=True) if good]
            advantages[usable] = self.statistics.normalize(prompts, rewards[usable])
        else:
            advantages[usable] = batch_normalize(rewards[usable])
        return np.clip(advantages, -self.config.advantage_clip, self.config.advantage_clip)

    def update(self, trajectories: Trajectories, rng: np.random.Generator) -> Metrics:
        """Minibatch updates on one iteration's trajectories; see `Agent.update`."""
        advantages = self.advantages(trajectories)
        usable = np.flatnonzero(np.isfinite(advantages))
        device_advantages = torch.as_tensor(advantages, dtype=torch.float32, device=self.policy.device)
        rows: list[dict[str, torch.Tensor]] = []
        for _ in range(self.config.inner_epochs):
            order = rng.permutation(usable)
            for start in range(0, len(order), self.config.batch_size):
                samples = torch.from_numpy(order[start : start + self.config.batch_size])
                rows.append(self._minibatch(trajectories, device_advantages, samples, rng))
        means = {key: float(torch.stack([row[key] for row in rows]).mean()) for key in rows[0]}
        return {**means, "updates": len(rows), "samples_dropped": len(advantages) - len(usable)}

    def _minibatch(
        self, trajectories: Trajectories, advantages: torch.Tensor, samples: torch.Tensor, rng: np.random.Generator
    ) -> dict[str, torch.Tensor]:
        """One optimiser step on all transitions of `samples`."""
        order = torch.from_numpy(rng.permutation(len(samples) * len(self.steps)))
        pairs = torch.cartesian_prod(samples, self.steps)[order]
        self.optimizer.zero_grad(set_to_none=True)
        totals: dict[str, torch.Tensor] = {}
        for part in pairs.to(self.policy.device).split(self.config.micro_batch_size):
            surrogate = self._transitions(trajectories, advantages, part)
            (surrogate.loss.sum() / len(pairs)).backward()
            for key, value in _sums(surrogate):
                totals[key] = totals.get(key, 0.0) + value / len(pairs)
        totals["grad_norm"] = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        self.optimizer.step()
        return totals

    def _transitions(self, trajectories: Trajectories, advantages: torch.Tensor, pairs: torch.Tensor) -> Surrogate:
        samples, steps = pairs.unbind(1)
        log_prob = self.policy(trajectories.states(samples, steps), trajectories.actions(samples, steps))
        return self.surrogate(log_prob, trajectories.log_probs[steps, samples], advantages[samples])

    def state(self) -> dict[str, Any]:
        """The per-prompt statistics."""
        return {"prompt_statistics": self.statistics.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` gave."""
        self.statistics.load(state["prompt_statistics"])


def _sums(surrogate: Surrogate) -> Iterator[tuple[str, torch.Tensor]]:
    yield "loss", surrogate.loss.detach().sum()
    yield "clip_fraction", surrogate.clipped.sum()
    yield "approx_kl", surrogate.approx_kl.sum()
