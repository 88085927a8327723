"""DDPO_IS: importance sampling with PPO's clipping (DDPO, equation 4 and appendix F.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffusion_gym.agents.algorithms.base import AGENTS, AgentConfig
from diffusion_gym.agents.algorithms.policy_gradient import PolicyGradientAgent, PolicyGradientConfig, Transitions
from diffusion_gym.agents.finite import require
from diffusion_gym.agents.losses import clipped_surrogate
from diffusion_gym.agents.optimization import Losses


@dataclass(frozen=True)
class ClippedConfig(PolicyGradientConfig):
    """Options of the agents that clip importance ratios: DDPO_IS and those with a KL term."""

    clip_range: float = 1e-4
    """The ratio pi/pi_old counts within 1 +- this; goes with `mean` log-probabilities of 16,384 dimensions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "larger than 0", "clip_range")


@AGENTS.register("ddpo_is")
class DDPOIS(PolicyGradientAgent):
    """Several clipped updates on each batch of trajectories."""

    Config: ClassVar[type[AgentConfig]] = ClippedConfig
    config: ClippedConfig

    def losses(self, batch: Transitions) -> Losses:
        """The clipped surrogate of M transitions."""
        log_prob = self.policy(batch.observation, batch.action)
        return clipped_surrogate(log_prob, batch.old_log_prob, batch.advantage, self.config.clip_range).rows()
