"""DDPO_SF: the score-function estimator, REINFORCE (DDPO, equation 3 and appendix F.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffusion_gym.agents.algorithms.base import AGENTS, AgentConfig
from diffusion_gym.agents.algorithms.policy_gradient import PolicyGradientAgent, PolicyGradientConfig, Transitions
from diffusion_gym.agents.losses import score_function_loss
from diffusion_gym.agents.optimization import Losses


@dataclass(frozen=True)
class DDPOSFConfig(PolicyGradientConfig):
    """Options of DDPO_SF."""

    batch_size: int = 256
    """Not used: all trajectories of an iteration are behind its one update, because the estimator is exact only for
    the policy that sampled them."""
    inner_epochs: int = 1
    """Updates on the same trajectories. Beyond the first the estimator is biased; the replication did it."""


@AGENTS.register("ddpo_sf")
class DDPOSF(PolicyGradientAgent):
    """One exact score-function update on each batch of trajectories."""

    Config: ClassVar[type[AgentConfig]] = DDPOSFConfig
    config: DDPOSFConfig

    def minibatch(self, usable: int) -> int:
        """All of them."""
        return usable

    def losses(self, batch: Transitions) -> Losses:
        """-A log pi of M transitions."""
        log_prob = self.policy(batch.observation, batch.action)
        return {
            "loss": score_function_loss(log_prob, batch.advantage),
            "approx_kl": 0.5 * (log_prob - batch.old_log_prob).detach() ** 2,
        }
