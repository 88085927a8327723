"""DiffusionNFT: what bad pictures teach, learned with what good ones do, on the forward process (arXiv:2509.16117).

The network's prediction, mixed with the behaviour policy's, gives two implicit ones (theorem 3.2): one that fits
pictures of high reward, and its mirror image beyond the behaviour policy, which fits those of low reward as the network
moves away from them. Details follow the authors' code, NVlabs/DiffusionNFT, scripts/train_nft_sd3.py.
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
)
from diffusion_gym.agents.finite import require
from diffusion_gym.agents.optimization import Losses
from diffusion_gym.agents.renoising import squared_error

_LEAST_ERROR = 1e-5  # the authors' floor of the normaliser


@dataclass(frozen=True)
class NFTConfig(ForwardProcessConfig):
    """Options of DiffusionNFT."""

    mixture: float = 1.0
    """beta: the share of the network in the implicit prediction for good pictures, 1 being the network itself. The
    optimum lies 2 / beta times as far from the behaviour policy: a smaller one learns faster, and less stably."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "larger than 0", "mixture")


@AGENTS.register("nft")
class NFT(ForwardProcessAgent):
    """Negative-aware fine-tuning of the estimate of x_0, with optimality r = A / (2 advantage_clip) + 1/2 in [0, 1]."""

    Config: ClassVar[type[AgentConfig]] = NFTConfig
    config: NFTConfig

    def losses(self, batch: NoisedPictures) -> Losses:
        """C / beta [r |x+ - x_0|^2 / w+ + (1 - r) |x- - x_0|^2 / w-] + lambda |v - v_ref|^2, c the advantage clip.

        x+ = (1 - beta) x_old + beta x_theta and x- = (1 + beta) x_old - beta x_theta are implicit estimates of x_0, w
        the mean |x - x_0| of each, without gradient. An estimate of x_0 is linear in what the network predicts, so
        that the mixture may be of noise, of x_0 or of velocities. The factors c and 1 / beta are the code's; they
        count beside lambda.
        """
        beta, bound = self.config.mixture, self.config.advantage_clip
        prediction = self.predict(batch)
        estimate, _ = self.policy.estimates(prediction, batch.observation)
        behaviour, _ = self.policy.estimates(batch.fixed["behaviour"], batch.observation)
        positive = _normalized_error(behaviour + beta * (estimate - behaviour), batch.clean)
        negative = _normalized_error(behaviour - beta * (estimate - behaviour), batch.clean)
        optimality = 0.5 + 0.5 * batch.advantage.clamp(-bound, bound) / bound
        loss = bound / beta * (optimality * positive + (1 - optimality) * negative)
        return self.penalized({"loss": loss, "policy_loss": loss.detach()}, prediction, batch)


def _normalized_error(estimate: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """|x - x_0|^2 over its own mean |x - x_0|, which has no gradient: `(M,)`, a mean over dimensions."""
    scale = (estimate - clean).detach().abs().flatten(1).mean(1).clamp(min=_LEAST_ERROR)
    return squared_error(estimate, clean) / scale
