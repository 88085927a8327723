"""Advantage Weighted Matching (AWM, arXiv:2509.25050): the policy gradient with pretraining's loss as likelihood.

The log-likelihood of a picture is estimated by how well the network predicts from x_t, the picture with fresh noise:
the lower bound that pretraining maximises. Details follow the authors' code, scxue/advantage_weighted_matching,
scripts/train_sd3_awm.py. The `renoise` of the policy gradients goes back to the same states but keeps the sampler's
Gaussian: its likelihood is that of the mean of a step, it has no power p, and its trust region and KL are per step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from diffusion_gym.agents.algorithms.base import AGENTS, AgentConfig
from diffusion_gym.agents.algorithms.forward_process import (
    ForwardProcessAgent,
    ForwardProcessConfig,
    NoisedPictures,
    NoisedUpdate,
)
from diffusion_gym.agents.finite import require
from diffusion_gym.agents.losses import clipped_surrogate
from diffusion_gym.agents.optimization import Losses
from diffusion_gym.agents.policy import DenoisingPolicy
from diffusion_gym.agents.processes import Processes
from diffusion_gym.agents.renoising import squared_error

_LEAST_ERROR = 1e-10  # the authors', where the power's slope would be infinite


@dataclass(frozen=True)
class AWMConfig(ForwardProcessConfig):
    """Options of AWM; the defaults are those of the authors' `geneval_sd3_no_cfg_1node`."""

    clip_range: float = 1.0
    """The ratio of likelihoods counts within 1 +- this."""
    error_power: float = 0.25
    """p: the log-likelihood is -t m^p / p, m being the mean squared error; 1 is the lower bound itself."""
    advantage_weight: float = 0.2
    """Advantages are multiplied by this after clipping: the authors' advantage_max / adv_clip_max."""
    kl_weight: float = 1e-3
    """Weight of the distance to the pretrained model: the mean squared difference of the two networks' predictions."""
    behaviour_weight: float = 1.0
    """Weight of the same distance to the behaviour policy, the moving average of the weights."""
    behaviour_decay: float = 0.3
    """Largest decay of that average."""
    off_policy: bool = False
    """Sample with the behaviour policy and take ratios to it, in place of the weights at the begin of the iteration."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "larger than 0", "clip_range", "error_power", "advantage_weight")
        require(self, "at least 0", "behaviour_weight")


@AGENTS.register("awm")
class AWM(ForwardProcessAgent):
    """PPO's clipping on likelihoods that are errors of the network's predictions."""

    Config: ClassVar[type[AgentConfig]] = AWMConfig
    config: AWMConfig

    def __init__(self, policy: DenoisingPolicy, config: AWMConfig, processes: Processes | None = None) -> None:
        super().__init__(policy, config, processes)
        self.behaviour_samples = config.off_policy

    def at_start(self, update: NoisedUpdate) -> dict[str, torch.Tensor]:
        """The log-likelihoods under the weights that sampled; of a single update they are its own."""
        if self.config.off_policy:
            return {}
        return {"log_prob": self.evaluated(update, lambda batch: self.log_likelihood(self.predict(batch), batch))}

    def log_likelihood(self, prediction: torch.Tensor, batch: NoisedPictures) -> torch.Tensor:
        """-t (m^p - epsilon^p) / p, `(M,)`, m the mean squared error; t, the noise's weight, is 1 at pure noise."""
        power = self.config.error_power
        error = squared_error(prediction, batch.target) + _LEAST_ERROR
        return -batch.level.flatten() * (error**power - _LEAST_ERROR**power) / power

    def losses(self, batch: NoisedPictures) -> Losses:
        """max(-A rho, -A clip(rho)) + lambda |v - v_ref|^2 + mu |v - v_behaviour|^2, rho = exp(l_theta - l_old)."""
        prediction, config = self.predict(batch), self.config
        log_prob = self.log_likelihood(prediction, batch)
        old = batch.fixed.get("log_prob", log_prob.detach())
        if config.off_policy:
            old = self.log_likelihood(batch.fixed["behaviour"], batch)
        surrogate = clipped_surrogate(log_prob, old, config.advantage_weight * batch.advantage, config.clip_range)
        rows = {**surrogate.rows(), "policy_loss": surrogate.loss.detach()}
        anchor = squared_error(prediction, batch.fixed["behaviour"])
        rows["loss"] = rows["loss"] + config.behaviour_weight * anchor
        return self.penalized(rows, prediction, batch)
