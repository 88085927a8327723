"""RWR: the denoising loss on the model's own samples, weighted by reward (DDPO, section C.2 and appendix F.2)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from diffusion_gym.agents.advantages import softmax_weights, usable_counts
from diffusion_gym.agents.algorithms.base import AGENTS, Agent, AgentConfig
from diffusion_gym.agents.algorithms.metrics import Metrics, update_metrics
from diffusion_gym.agents.finite import require
from diffusion_gym.agents.optimization import Losses
from diffusion_gym.agents.policy import DenoisingPolicy
from diffusion_gym.agents.processes import Processes
from diffusion_gym.agents.renoising import fresh_noise, renoised_states, squared_error
from diffusion_gym.agents.rollout import Trajectories
from diffusion_gym.agents.solver import RolloutOptions, solver_of


@dataclass(frozen=True)
class RegressionConfig(RolloutOptions, AgentConfig):
    """Options of the reward-weighted agents; the defaults are those of the DDPO paper, table F.6."""

    batch_size: int = 128
    """Pictures behind one gradient update, each at a noise level of its own."""
    updates: int = 400
    """Gradient updates an iteration."""
    group_size: int = 1
    """Samples in a row that share a prompt. Rewards are weighed within a prompt, which needs several samples in an
    iteration: with more prompts than samples, groups."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "larger than 0", "batch_size", "updates", "group_size")


class RegressionAgent(Agent):
    """Fits the guided noise prediction to finished pictures, each with a weight that its reward decides.

    It sees the one-step process alone: prompt, x_0, reward. No step needs to be stochastic.
    """

    Config: ClassVar[type[AgentConfig]] = RegressionConfig
    config: RegressionConfig
    needs_stochastic_steps: ClassVar[bool] = False
    finished_only: bool = True

    def __init__(self, policy: DenoisingPolicy, config: RegressionConfig, processes: Processes | None = None) -> None:
        super().__init__(policy, config, processes)
        self.solver, self.group_size = solver_of(policy, config), config.group_size

    @abstractmethod
    def weights(self, prompts: Sequence[str], rewards: np.ndarray) -> np.ndarray:
        """Weights `(N,)`, not negative; 0 where a reward is not finite."""

    def update(self, trajectories: Trajectories, rng: np.random.Generator) -> Metrics:
        """`updates` gradient steps on one iteration's pictures; see `Agent.update`.

        The only usable sample of a prompt is left out: its weight would be the same whatever its reward.

        Raises:
            NoUsableReward: no reward is finite.
            ValueError: no prompt has two usable samples.
        """
        prompts, rewards = self.rewards(trajectories)
        alone = np.isfinite(rewards) & (usable_counts(prompts, rewards) < 2)
        if alone.sum() == np.isfinite(rewards).sum():
            raise ValueError(
                f"each of the {alone.sum()} samples of the iteration is the only one of its prompt, so that its weight "
                "would be the same whatever its reward; give group_size=8 or the like (--agent.group-size), more "
                "samples_per_iteration, or fewer prompts"
            )
        weights = np.where(alone, 0.0, self.weights(prompts, rewards))
        used = np.flatnonzero(weights > 0)
        scaled = torch.as_tensor(weights / weights[used].mean(), dtype=torch.float32, device=self.policy.device)
        first = self.processes.index * len(trajectories)
        rows = []
        for batch in _minibatches(used, self.config.batch_size, self.config.updates, rng):
            noise = fresh_noise(trajectories, len(batch), int(rng.integers(2**62)))
            steps = self.steps[torch.from_numpy(rng.integers(len(self.steps), size=len(batch)))]
            items = torch.stack([torch.from_numpy(batch), steps, torch.arange(len(batch))], dim=1)

            def losses(part: torch.Tensor, noise: torch.Tensor = noise) -> Losses:
                samples, steps, rows = part.unbind(1)
                return self.losses(trajectories, samples, steps, noise[rows], scaled[first + samples])

            rows.append(self.minimize(self.local(items, len(trajectories)), losses, len(items)))
        effective = weights.sum() ** 2 / (weights**2).sum()
        counts = {"samples_alone": int(alone.sum()), "samples_dropped": int((~np.isfinite(rewards)).sum())}
        return {**update_metrics(rows), "effective_samples": float(effective), **counts}

    def losses(
        self,
        trajectories: Trajectories,
        samples: torch.Tensor,
        steps: torch.Tensor,
        noise: torch.Tensor,
        weights: torch.Tensor,
    ) -> Losses:
        """W ||eps - eps_theta(x_t, t, c)||^2 of M noised pictures, a mean over dimensions.

        Args:
            trajectories: this process's samples.
            samples: which of them, int64 `(M,)`.
            steps: the step of the sampler whose noise level each gets, int64 `(M,)`.
            noise: eps, `(M, C, H, W)`.
            weights: w, `(M,)`, scaled to a mean of 1 over the samples with any weight.
        """
        observation = renoised_states(self.policy.table, trajectories, samples, steps, noise)
        error = squared_error(self.policy.predicted_noise(observation), noise)
        return {"loss": weights * error, "denoising_error": error.detach()}


@dataclass(frozen=True)
class RWRConfig(RegressionConfig):
    """Options of RWR."""

    inverse_temperature: float = 0.2
    """beta of the softmax over the rewards of each prompt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.inverse_temperature < float("inf"):
            raise ValueError(f"inverse_temperature={self.inverse_temperature!r} must be a number of at least 0")


@AGENTS.register("rwr")
class RWR(RegressionAgent):
    """Reward-weighted regression with exponentiated rewards."""

    Config: ClassVar[type[AgentConfig]] = RWRConfig
    config: RWRConfig

    def weights(self, prompts: Sequence[str], rewards: np.ndarray) -> np.ndarray:
        """softmax(beta r) over the samples of each prompt."""
        return softmax_weights(prompts, rewards, self.config.inverse_temperature)


def _minibatches(used: np.ndarray, size: int, number: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """`number` minibatches from as many shuffled passes over `used` as it takes."""
    passes = -(-size * number // len(used))
    order = np.concatenate([rng.permutation(used) for _ in range(passes)])
    for start in range(0, size * number, size):
        yield order[start : start + size]
