"""DDPO_IS: importance sampling with PPO's clipping (DDPO, equation 4 and appendix F.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from diffusion_gym.agents.algorithms.base import AGENTS, AgentConfig
from diffusion_gym.agents.algorithms.policy_gradient import PolicyGradientAgent, PolicyGradientConfig
from diffusion_gym.agents.losses import Surrogate, clipped_surrogate


@dataclass(frozen=True)
class DDPOISConfig(PolicyGradientConfig):
    """Options of DDPO_IS."""

    clip_range: float = 1e-4
    """The ratio pi/pi_old counts within 1 +- this; goes with `mean` log-probabilities of 16,384 dimensions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.clip_range > 0:
            raise ValueError(f"clip_range={self.clip_range!r} must be larger than 0")


@AGENTS.register("ddpo_is")
class DDPOIS(PolicyGradientAgent):
    """Several clipped updates on each batch of trajectories."""

    Config: ClassVar[type[AgentConfig]] = DDPOISConfig
    config: DDPOISConfig

    def surrogate(self, log_prob: torch.Tensor, old_log_prob: torch.Tensor, advantage: torch.Tensor) -> Surrogate:
        """The clipped surrogate loss of M transitions."""
        return clipped_surrogate(log_prob, old_log_prob, advantage, self.config.clip_range)
