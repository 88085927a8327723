"""What the agents with advantages have in common: groups, normalised rewards, minibatches over pictures and steps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from diffusion_gym.agents.advantages import AdvantageOptions, NoUsableReward, RewardNormalizer
from diffusion_gym.agents.algorithms.base import Agent, AgentConfig, AgentState
from diffusion_gym.agents.algorithms.metrics import Metrics, update_metrics
from diffusion_gym.agents.finite import require
from diffusion_gym.agents.optimization import Losses
from diffusion_gym.agents.policy import DenoisingPolicy
from diffusion_gym.agents.processes import Processes
from diffusion_gym.agents.rollout import Trajectories
from diffusion_gym.agents.solver import RolloutOptions, solver_of
from diffusion_gym.registry import unknown_name

# This process's items of an update, the losses of some of them, and how many items all processes have.
Update = tuple[torch.Tensor, Callable[[torch.Tensor], Losses], int]


@dataclass(frozen=True)
class MinibatchConfig(AdvantageOptions, RolloutOptions, AgentConfig):
    """Options of the agents with advantages."""

    batch_size: int = 64
    """Trajectories behind one gradient update; gradients are accumulated over all their time steps."""
    inner_epochs: int = 1
    """Passes over the trajectories of an iteration."""
    shared_noise: bool = False
    """Begin all samples of a group from the same noise x_T (DanceGRPO)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "larger than 0", "batch_size", "inner_epochs")
        if self.shared_noise and self.group_size < 2:
            raise ValueError(f"shared_noise=True needs group_size={self.group_size!r} to be at least 2")


class MinibatchState(AgentState):
    """The rewards behind each prompt's statistics too."""

    prompt_statistics: dict[str, list[float]]


class MinibatchAgent(Agent):
    """Gradient steps on the losses of a subclass, over minibatches of samples with advantages."""

    Config: ClassVar[type[AgentConfig]] = MinibatchConfig
    State: ClassVar[type[AgentState]] = MinibatchState
    config: MinibatchConfig

    def __init__(self, policy: DenoisingPolicy, config: MinibatchConfig, processes: Processes | None = None) -> None:
        super().__init__(policy, config, processes)
        self.normalizer, self.solver = RewardNormalizer(config), solver_of(policy, config)
        self.group_size, self.shared_noise = config.group_size, config.shared_noise

    @abstractmethod
    def updates(
        self,
        trajectories: Trajectories,
        advantages: torch.Tensor,
        minibatches: list[torch.Tensor],
        rng: np.random.Generator,
    ) -> Iterator[Update]:
        """The gradient updates of an iteration, each as `Agent.minimize` takes it; the next one is asked for after it.

        Args:
            trajectories: this process's.
            advantages: theirs, float32 `(N,)` or `(T, N)`.
            minibatches: pairs (sample, step) of each update, int64 `(B, 2)`, samples counted over all processes.
            rng: as `update`'s.
        """

    def advantages(self, trajectories: Trajectories) -> np.ndarray:
        """Normalised rewards `(N,)`, clipped; see `normalized_rewards`. `(T, N)` gives each step one of its own."""
        return self.normalizer.clip(self.normalized_rewards(trajectories))

    def normalized_rewards(self, trajectories: Trajectories) -> np.ndarray:
        """Normalised rewards `(N,)` of all processes' trajectories; NaN for the samples whose reward failed.

        Raises:
            NoUsableReward: no reward is finite.
        """
        return self.normalizer.normalize(*self.rewards(trajectories), self._components(trajectories))

    def _components(self, trajectories: Trajectories) -> dict[str, np.ndarray]:
        """The components `(N,)` of all processes' rewards that `component_weights` names.

        Raises:
            ValueError: the reward has no such component.
        """
        found = {}
        known = self.processes.gather_json(sorted(trajectories.components)) if self.config.component_weights else []
        for name in self.config.weights_of_components():
            if any(name not in own for own in known):
                raise ValueError(unknown_name("component_weights", name, known[0]))
            found[name] = self.processes.gather(trajectories.components[name].double()).cpu().numpy()
        return found

    def update(self, trajectories: Trajectories, rng: np.random.Generator) -> Metrics:
        """Minibatch updates on one iteration's trajectories; see `Agent.update`."""
        advantages = self.advantages(trajectories)
        finite = np.isfinite(advantages)
        usable = np.flatnonzero(finite if finite.ndim == 1 else finite.all(0))
        if not len(usable):
            raise NoUsableReward("no sample of the iteration has an advantage: too few rewards of a group are finite")
        local = self.local_values(advantages, trajectories)
        rows: list[dict[str, torch.Tensor]] = []
        for update in self.updates(trajectories, local, self.minibatches(usable, rng), rng):
            rows.append(self.minimize(*update))
            if self.finished(rows[-1]):
                break
        groups = {"equal_groups": self.normalizer.equal_share} if self.config.normalization == "group" else {}
        return {**update_metrics(rows), **groups, "samples_dropped": finite.shape[-1] - len(usable)}

    def minibatches(self, usable: np.ndarray, rng: np.random.Generator) -> list[torch.Tensor]:
        """Pairs (sample, step) of each update of an iteration, int64 `(B, 2)`.

        Args:
            usable: indices of the samples to learn from, counted over all processes.
            rng: draws the order and the steps.
        """
        size = self.minibatch(len(usable))
        return [
            self.transitions(order[start : start + size], rng)
            for order in (rng.permutation(usable) for _ in range(self.config.inner_epochs))
            for start in range(0, len(order), size)
        ]

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
