"""DDPO_IS: importance sampling with PPO's clipping (DDPO, equation 4 and appendix F.1), or another trust region."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from diffusion_gym.agents.algorithms.base import AGENTS, AgentConfig
from diffusion_gym.agents.algorithms.policy_gradient import PolicyGradientAgent, PolicyGradientConfig, Transitions
from diffusion_gym.agents.distribution import DenoisingDistribution
from diffusion_gym.agents.finite import require, require_choice
from diffusion_gym.agents.losses import Surrogate, clipped_surrogate, masked_surrogate, normalized_surrogate
from diffusion_gym.agents.optimization import Losses
from diffusion_gym.scheduling import StepTable, gaussian_kl

TrustRegion = Literal["ratio", "normalized_ratio", "divergence"]


@dataclass(frozen=True)
class ClippedConfig(PolicyGradientConfig):
    """Options of the agents that clip importance ratios: DDPO_IS and those with a KL term."""

    clip_range: float = 1e-4
    """The ratio pi/pi_old counts within 1 +- this; goes with `mean` log-probabilities of 16,384 dimensions."""
    trust_region: TrustRegion = "ratio"
    """What holds an update near the policy that sampled: PPO's clipping of the ratio; of the ratio normalised by step
    (GRPO-Guard); or no gradient beyond a divergence (Flow-DPPO). The last two compare means: with several updates an
    iteration, one more forward pass."""
    divergence_bound: float = 1e-5
    """That divergence of the two Gaussians of a step, in nats, reduced like log-probabilities."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "larger than 0", "clip_range", "divergence_bound")
        require_choice(self, "trust_region", TrustRegion)


class ClippedAgent(PolicyGradientAgent):
    """The surrogate objectives of an agent that stays near the policy that sampled."""

    Config: ClassVar[type[AgentConfig]] = ClippedConfig
    config: ClippedConfig

    @property
    def compares_means(self) -> bool:
        """Whether the trust region is one of the Gaussians' means."""
        return self.config.trust_region != "ratio"

    def surrogate(self, policy: DenoisingDistribution, batch: Transitions) -> Surrogate:
        """The surrogate objective of M transitions in the trust region that the options choose.

        Args:
            policy: the Gaussians of the policy that is trained, for the batch's states.
            batch: the transitions.
        """
        log_prob, kind, bound = policy.log_prob(batch.action), self.config.trust_region, self.config.clip_range
        if kind == "ratio":
            return clipped_surrogate(log_prob, batch.old_log_prob, batch.advantage, bound)
        old_mean = policy.mean.detach() if batch.old_mean is None else batch.old_mean
        divergence = gaussian_kl(policy.mean, old_mean, policy.std, policy.reduction)
        if kind == "divergence":
            bound = self.config.divergence_bound
            return masked_surrogate(log_prob, batch.old_log_prob, divergence.detach(), batch.advantage, bound)
        interval = _step_lengths(self.policy.table)[batch.observation["step"]]
        old, std = batch.old_log_prob, policy.std.flatten()
        return normalized_surrogate(log_prob, old, divergence, std, interval, batch.advantage, bound)


def _step_lengths(table: StepTable) -> torch.Tensor:
    """How far each step goes in time, of the whole process, float32 `(T,)`: |dt| of a flow-matching model."""
    times = table.network_timesteps / (len(table.step_of) - 1)
    return (times - torch.cat([times[1:], times.new_zeros(1)])).float()


@AGENTS.register("ddpo_is")
class DDPOIS(ClippedAgent):
    """Several clipped updates on each batch of trajectories."""

    def losses(self, batch: Transitions) -> Losses:
        """The clipped surrogate of M transitions."""
        if self.compares_means:
            return self.surrogate(self.policy.distribution(batch.observation), batch).rows()
        log_prob = self.policy(batch.observation, batch.action)
        return clipped_surrogate(log_prob, batch.old_log_prob, batch.advantage, self.config.clip_range).rows()
