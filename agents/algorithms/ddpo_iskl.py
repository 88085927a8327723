"""DDPO_ISKL: DDPO_IS with a penalty on the distance to the pretrained model (the replication, algorithm 5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffusion_gym.agents.algorithms.base import AGENTS, AgentConfig
from diffusion_gym.agents.algorithms.ddpo_is import ClippedAgent, ClippedConfig
from diffusion_gym.agents.algorithms.policy_gradient import Transitions
from diffusion_gym.agents.finite import require, require_choice
from diffusion_gym.agents.losses import KLForm, with_kl_penalty
from diffusion_gym.agents.optimization import Losses


@dataclass(frozen=True)
class DDPOISKLConfig(ClippedConfig):
    """Options of DDPO_ISKL."""

    kl_weight: float = 0.1
    """lambda, the weight of the penalty, in advantages a nat of each step's divergence, as the beta of the KL wrapper;
    the replication does not give its value."""
    kl_form: KLForm = "squared_log_ratio"
    """The penalty of a step: (l_theta - l_ref)^2 / 2 as in the replication or the closed form of the Gaussians, both in
    nats; or the closed form without its denominator."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self, "kl_form", KLForm)
        if self.renoise and self.kl_form == "squared_log_ratio":
            raise ValueError(
                "kl_form='squared_log_ratio' estimates the divergence from sampled actions, not those of renoise=True; "
                "use kl_form='closed_form'"
            )
        require(self, "at least 0", "kl_weight")


@AGENTS.register("ddpo_iskl")
class DDPOISKL(ClippedAgent):
    """Several clipped updates on each batch of trajectories, held near the pretrained model."""

    Config: ClassVar[type[AgentConfig]] = DDPOISKLConfig
    config: DDPOISKLConfig

    def losses(self, batch: Transitions) -> Losses:
        """The clipped surrogate of M transitions plus the weighted penalty."""
        policy = self.policy.distribution(batch.observation)
        reference = self.policy.reference_distribution(batch.observation)
        surrogate, config = self.surrogate(policy, batch), self.config
        return with_kl_penalty(surrogate.rows(), policy, reference, batch.action, config.kl_form, config.kl_weight)
