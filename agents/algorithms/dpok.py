"""DPOK: a clipped policy gradient with a value baseline, a KL term and a replay buffer (arXiv:2305.16381).

The objective is E[-alpha r(x_0, c) + beta sum_t KL(p_theta || p_pre)]; figures and defaults are those of the authors'
code (google-research/dpok). Unlike that code, a ratio is clipped as in PPO, so that a step that went too far is still
pulled back, and the divergence is that of the Gaussians, where the code compares noise predictions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

from diffusion_gym.agents.algorithms.base import AGENTS, AgentConfig, AgentState, OptimizerState, part_of
from diffusion_gym.agents.algorithms.ddpo_is import ClippedConfig
from diffusion_gym.agents.algorithms.metrics import Metrics, averages, update_metrics
from diffusion_gym.agents.algorithms.policy_gradient import (
    Normalization,
    PolicyGradientAgent,
    PolicyGradientState,
    Transitions,
)
from diffusion_gym.agents.losses import KLForm, check_kl_form, clipped_surrogate, with_kl_penalty
from diffusion_gym.agents.optimization import AccumulatingOptimizer, Losses
from diffusion_gym.agents.policy import DenoisingPolicy
from diffusion_gym.agents.processes import Processes
from diffusion_gym.agents.replay import ReplayBuffer
from diffusion_gym.agents.rollout import Trajectories
from diffusion_gym.agents.value import ValueNetwork


@dataclass(frozen=True)
class DPOKConfig(ClippedConfig):
    """Options of DPOK; the defaults are those of the authors' code."""

    normalization: Normalization = "none"
    """What rewards are normalised by; DPOK takes them as they are and subtracts a learned value."""
    advantage_clip: float = 1e6
    """Advantages are clipped to +- this; the authors do not clip them, and raw rewards may be far from 0."""
    max_grad_norm: float = 0.1
    """Largest gradient norm; a longer gradient is scaled down to it."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    batch_size: int = 24
    """Transitions behind one gradient update of the policy, drawn from the replay buffer."""
    updates: int = 5
    """Gradient updates of the policy an iteration."""
    reward_weight: float = 100.0
    """alpha, the weight of the reward."""
    kl_weight: float = 0.01
    """beta, the weight of the divergence to the pretrained model at each step, in weighted rewards (alpha r) a nat."""
    kl_form: KLForm = "closed_form"
    """How the divergence is measured: in nats, but for `unscaled`."""
    value_function: bool = True
    """Subtract a learned value V(x_t, t, c) from the reward."""
    value_learning_rate: float = 1e-4
    """Learning rate of the value function."""
    value_batch_size: int = 256
    """Transitions behind one gradient update of the value function."""
    value_updates: int = 5
    """Gradient updates of the value function an iteration, before those of the policy."""
    replay_iterations: int = 3
    """Iterations whose trajectories the replay buffer holds; three of 6 x 50 transitions fit the 1,000 of the code."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kl_form(self.kl_form)
        if self.renoise:
            raise ValueError(
                "renoise=True is not for DPOK, whose replay buffer holds the transitions that were sampled; leave it "
                "out, or take another agent"
            )
        for name in ("updates", "reward_weight", "value_learning_rate", "value_batch_size", "replay_iterations"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be larger than 0")
        for name in ("kl_weight", "value_updates"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be at least 0")


class _State(PolicyGradientState):
    value_optimizer: OptimizerState


@AGENTS.register("dpok")
class DPOK(PolicyGradientAgent):
    """Policy gradient with KL regularisation; every update draws random transitions of the last rollouts."""

    Config: ClassVar[type[AgentConfig]] = DPOKConfig
    State: ClassVar[type[AgentState]] = _State
    config: DPOKConfig

    def __init__(self, policy: DenoisingPolicy, config: DPOKConfig, processes: Processes | None = None) -> None:
        super().__init__(policy, config, processes)
        self.buffer = ReplayBuffer(config.replay_iterations, self.processes)
        model = policy.model
        features = policy.embed(model.tokenize([""])).shape[-1] if model.prompt_length else 0
        self.value = ValueNetwork(model.latent_shape[0], features, model.num_train_timesteps).to(policy.device)
        options = config.optimizer_options(
            learning_rate=config.value_learning_rate, schedule="constant", loss_scaling=False, max_grad_norm=1.0
        )
        self.value_optimizer = AccumulatingOptimizer(dict(self.value.named_parameters()), options, self.processes)
        self.processes.copy_main_(self.value_optimizer.parameters)

    def update(self, trajectories: Trajectories, rng: np.random.Generator) -> Metrics:
        """Fit the value function, then the policy, to transitions of the replay buffer; see `Agent.update`."""
        returns = self.normalized_rewards(trajectories)
        self.buffer.add(trajectories, returns)
        metrics: Metrics = {}
        if self.config.value_function and self.config.value_updates:
            rows = [
                self.value_optimizer.step(*self._draw(self.config.value_batch_size, self._value_losses, rng))
                for _ in range(self.config.value_updates)
            ]
            metrics = {"value_loss": averages(rows)["loss"]}
        rows = [
            self.minimize(*self._draw(self.config.batch_size, self._policy_losses, rng))
            for _ in range(self.config.updates)
        ]
        dropped = int((~np.isfinite(returns)).sum())
        return {**metrics, **update_metrics(rows), "samples_dropped": dropped}

    def losses(self, batch: Transitions) -> Losses:
        """Alpha times the clipped surrogate of M transitions, plus beta times the divergence."""
        policy = self.policy.distribution(batch.observation)
        surrogate = clipped_surrogate(
            policy.log_prob(batch.action), batch.old_log_prob, batch.advantage, self.config.clip_range
        )
        rows = {**surrogate.rows(), "loss": self.config.reward_weight * surrogate.loss}
        if self.config.kl_weight:
            reference = self.policy.reference_distribution(batch.observation)
            kind, weight = self.config.kl_form, self.config.kl_weight
            rows = with_kl_penalty(rows, policy, reference, batch.action, kind, weight)
        return rows

    def _draw(self, number: int, losses: Any, rng: np.random.Generator) -> tuple[torch.Tensor, Any, int]:
        """Random transitions of the buffer: this process's, their loss, and how many there are in all."""
        pairs = self.transitions(self.buffer.usable(), rng)[:number]
        return self.buffer.local(pairs), losses, len(pairs)

    def _batch(self, pairs: torch.Tensor) -> Transitions:
        return Transitions.at(self.buffer.trajectories, self.buffer.own_returns, pairs)

    def _values(self, batch: Transitions) -> torch.Tensor:
        embeddings = self.policy.embeddings_of(batch.observation)
        return self.value(batch.observation["latents"], batch.observation["timestep"][:, 0], embeddings)

    def _value_losses(self, pairs: torch.Tensor) -> Losses:
        batch = self._batch(pairs)
        return {"loss": (self._values(batch) - batch.advantage) ** 2}

    def _policy_losses(self, pairs: torch.Tensor) -> Losses:
        batch, bound = self._batch(pairs), self.config.advantage_clip
        with torch.no_grad():
            baseline = self._values(batch) if self.config.value_function else 0.0
            advantage = (batch.advantage - baseline).clamp(-bound, bound)
        return self.losses(replace(batch, advantage=advantage))

    def learned(self) -> list[torch.Tensor]:
        """The value function and its optimiser's moments too."""
        return [*super().learned(), *self.value.state_dict().values(), *self.value_optimizer.tensors().values()]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The value function and the part of the replay buffer that outlives the next rollout too."""
        value = {f"value.{name}": tensor for name, tensor in self.value.state_dict().items()}
        adam = {f"value_optimizer.{name}": tensor for name, tensor in self.value_optimizer.tensors().items()}
        kept = {f"replay.{name}": tensor for name, tensor in self.buffer.tensors().items()}
        return {**super().tensors(), **value, **adam, **kept}

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put back what `tensors` gave."""
        super().load_tensors(tensors)
        self.value.load_state_dict(part_of(tensors, "value"))
        self.value_optimizer.load_tensors(part_of(tensors, "value_optimizer"))
        self.buffer.load(part_of(tensors, "replay"), self.policy)

    def state(self) -> dict[str, Any]:
        """The value function's optimiser too."""
        return {**super().state(), "value_optimizer": self.value_optimizer.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` gave."""
        super().load_state(state)
        self.value_optimizer.load_state(state["value_optimizer"])
