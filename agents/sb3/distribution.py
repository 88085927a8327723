"""The policy's Gaussian as Stable-Baselines3's `Distribution`."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from stable_baselines3.common.distributions import Distribution
from torch import nn

from diffusion_gym.agents.policy import DenoisingDistribution


class GuidedGaussian(Distribution):
    """The Gaussian over x_{t-1} in SB3's words.

    Args:
        gaussian: the policy's distribution of N states.
    """

    def __init__(self, gaussian: DenoisingDistribution) -> None:
        super().__init__()
        self.gaussian = gaussian

    def log_prob(self, actions: torch.Tensor) -> torch.Tensor:
        """Log-probabilities `(N,)` of actions `(N, C, H, W)`, or `(N, C * H * W)` as SB3's buffers keep them."""
        return self.gaussian.log_prob(actions.reshape(self.gaussian.mean.shape))

    def entropy(self) -> torch.Tensor:
        """Entropies `(N,)`, reduced like log-probabilities; constant, because sigma_t is; 0 at deterministic steps."""
        std = self.gaussian.std.flatten()
        known = torch.where(std > 0, std, 1.0).log() + 0.5 * math.log(2 * math.pi * math.e)
        each = torch.where(std > 0, known, 0.0)
        return each if self.gaussian.reduction == "mean" else each * self.gaussian.mean[0].numel()

    def sample(self) -> torch.Tensor:
        """Actions x_{t-1}, float32 `(N, C, H, W)`, from PyTorch's global generator, which SB3 seeds."""
        return self.gaussian.sample()

    def mode(self) -> torch.Tensor:
        """The means, `(N, C, H, W)`."""
        return self.gaussian.mean

    def proba_distribution_net(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Not used: the UNet is the network."""
        raise NotImplementedError("the UNet is the network; see CFGUNetPolicy.get_distribution")

    def proba_distribution(self, gaussian: DenoisingDistribution) -> Self:  # type: ignore[override]
        """Take another Gaussian."""
        self.gaussian = gaussian
        return self

    def actions_from_params(self, gaussian: DenoisingDistribution, deterministic: bool = False) -> torch.Tensor:
        """Actions of another Gaussian."""
        return self.proba_distribution(gaussian).get_actions(deterministic)

    def log_prob_from_params(self, gaussian: DenoisingDistribution) -> tuple[torch.Tensor, torch.Tensor]:
        """Sampled actions of another Gaussian, and their log-probabilities."""
        actions = self.actions_from_params(gaussian)
        return actions, self.log_prob(actions)
