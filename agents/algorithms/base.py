"""What an agent is, and the options that every agent shares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from diffusion_gym.agents.policy import DenoisingPolicy, Trainable
from diffusion_gym.agents.rollout import Trajectories
from diffusion_gym.registry import Registry
from diffusion_gym.storage import optimizer_tensors, restore_optimizer

Metrics = dict[str, float]


@dataclass(frozen=True)
class AgentConfig:
    """Options that every agent shares; the defaults are those of the DDPO paper, table F.6."""

    trainable: Trainable = "lora"
    """What trains: low-rank adapters on the attention layers, or all weights of the UNet."""
    lora_rank: int = 4
    """Rank of the adapters."""
    learning_rate: float = 1e-5
    """Learning rate of AdamW."""
    adam_beta1: float = 0.9
    """First-moment decay of AdamW."""
    adam_beta2: float = 0.999
    """Second-moment decay of AdamW."""
    adam_epsilon: float = 1e-8
    """Epsilon of AdamW."""
    weight_decay: float = 1e-4
    """Weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Largest gradient norm; a longer gradient is scaled down to it."""
    batch_size: int = 64
    """Trajectories behind one gradient update; gradients are accumulated over all their time steps."""
    inner_epochs: int = 1
    """Passes over the trajectories of an iteration."""
    micro_batch_size: int = 8
    """Transitions in one forward and backward pass; changes speed and memory, not the result."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "max_grad_norm", "batch_size", "inner_epochs", "micro_batch_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be larger than 0")


class NoUsableReward(RuntimeError):
    """Every reward of an iteration was NaN or infinite: there is nothing to learn from."""


class Agent(ABC):
    """Learns from trajectories by changing its policy.

    Args:
        policy: the policy to train.
        config: the agent's options, an instance of its `Config`.

    Raises:
        ValueError: the sampler has no stochastic step, so that there is no policy gradient.
    """

    Config: ClassVar[type[AgentConfig]] = AgentConfig

    def __init__(self, policy: DenoisingPolicy, config: AgentConfig) -> None:
        if len(policy.stochastic_steps) == 0:
            raise ValueError(
                f"eta={policy.config.eta} makes every denoising step deterministic, so that a policy gradient does "
                "not exist; use eta=1 (ancestral sampling) or sigma_min > 0"
            )
        self.policy, self.config = policy, config
        self.parameters = list(policy.trainable_parameters().values())
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
        )

    @abstractmethod
    def update(self, trajectories: Trajectories, rng: np.random.Generator) -> Metrics:
        """Learn from one iteration's trajectories.

        Args:
            trajectories: sampled with the current policy.
            rng: the only source of randomness, so that a resumed run equals the uninterrupted one.

        Returns:
            Numbers for the metrics file.

        Raises:
            NoUsableReward: no reward is finite.
        """

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything of the agent that a checkpoint stores as tensors."""
        weights = {f"policy.{name}": value.detach() for name, value in self.policy.trainable_parameters().items()}
        return weights | {f"optimizer.{name}": value for name, value in optimizer_tensors(self.optimizer).items()}

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put back what `tensors` gave.

        Raises:
            ValueError: the tensors are of another policy.
        """
        parameters = self.policy.trainable_parameters()
        stored = {key.removeprefix("policy."): value for key, value in tensors.items() if key.startswith("policy.")}
        if {k: v.shape for k, v in stored.items()} != {k: v.shape for k, v in parameters.items()}:
            raise ValueError(
                "the checkpoint holds the weights of another policy; check the model, trainable and lora_rank"
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(stored[name])
        adam = {key.removeprefix("optimizer."): v for key, v in tensors.items() if key.startswith("optimizer.")}
        restore_optimizer(self.optimizer, adam)

    def state(self) -> dict[str, Any]:
        """Everything else that a checkpoint stores, as JSON values."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - nothing to put back by default
        """Put back what `state` gave."""


AGENTS: Registry[type[Agent]] = Registry("agent")
