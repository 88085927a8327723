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

from diffusion_gym.agents.advantages import Normalization
from diffusion_gym.agents.algorithms.base import AGENTS, AgentConfig, AgentState, OptimizerState
from diffusion_gym.agents.algorithms.ddpo_is import ClippedConfig
from diffusion_gym.agents.algorithms.metrics import Metrics, averages, update_metrics
from diffusion_gym.agents.algorithms.minibatch import MinibatchState
from diffusion_gym.agents.algorithms.policy_gradient import PolicyGradientAgent, Transitions
from diffusion_gym.agents.finite import require, require_choice
from diffusion_gym.agents.losses import KLForm, clipped_surrogate, with_kl_penalty
from diffusion_gym.agents.optimization import AccumulatingOptimizer, Losses, OptimizerOptions
from diffusion_gym.agents.policy import DenoisingPolicy
from diffusion_gym.agents.processes import Processes
from diffusion_gym.agents.replay import ReplayBuffer
from diffusion_gym.agents.rollout import Trajectories
from diffusion_gym.agents.value import ValueNetwork
from diffusion_gym.storage import joined, part_of


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
        require_choice(self, "kl_form", KLForm)
        if self.renoise:
            raise ValueError(
                "renoise=True is not for DPOK, whose replay buffer holds the transitions that were sampled; leave it "
                "out, or take another agent"
            )
        if self.trust_region != "ratio":
            raise ValueError(
                f"trust_region={self.trust_region!r} is not for DPOK, whose replay buffer holds no means; use 'ratio'"
            )
        if self.noise_window != "fixed":
            raise ValueError(
                f"noise_window={self.noise_window!r} is not for DPOK, whose replay buffer holds transitions of other "
                "iterations, where other steps had noise; leave it at 'fixed', or take another agent"
            )
        names = ("updates", "reward_weight", "value_learning_rate", "value_batch_size", "replay_iterations")
        require(self, "larger than 0", *names)
        require(self, "at least 0", "kl_weight", "value_updates")


class _State(MinibatchState):
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
        self.value = ValueNetwork.of(policy)
        rate, norm = config.value_learning_rate, OptimizerOptions.max_grad_norm
        options = replace(config, learning_rate=rate, learning_rate_schedule="constant", max_grad_norm=norm)
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
        return Transitions.at(self.buffer.trajectories, self.buffer.local_returns, pairs)

    def _value_losses(self, pairs: torch.Tensor) -> Losses:
        batch = self._batch(pairs)
        return {"loss": (self.value.values(self.policy, batch.observation) - batch.advantage) ** 2}

    def _policy_losses(self, pairs: torch.Tensor) -> Losses:
        batch, bound = self._batch(pairs), self.config.advantage_clip
        with torch.no_grad():
            baseline = self.value.values(self.policy, batch.observation) if self.config.value_function else 0.0
            advantage = (batch.advantage - baseline).clamp(-bound, bound)
        return self.losses(replace(batch, advantage=advantage))

    def learned(self) -> list[torch.Tensor]:
        """The value function and its optimiser's moments too."""
        return [*super().learned(), *self.value.state_dict().values(), *self.value_optimizer.tensors().values()]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The value function and the part of the replay buffer that outlives the next rollout too."""
        parts = {"value": self.value.state_dict(), "value_optimizer": self.value_optimizer.tensors()}
        return {**super().tensors(), **joined({**parts, "replay": self.buffer.tensors()})}

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
