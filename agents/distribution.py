"""The Gaussian over x_{t-1}: what a policy says of N states."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from diffusion_gym.config import Reduction
from diffusion_gym.scheduling import gaussian_kl, gaussian_log_prob


@dataclass(frozen=True)
class DenoisingDistribution:
    """The Gaussian over x_{t-1} for N states.

    Attributes:
        mean: mu_theta, float32 `(N, C, H, W)`.
        std: sigma_t, float32 `(N, 1, 1, 1)`; 0 where the step is deterministic.
        reduction: how a log-probability sums up the dimensions.
    """

    mean: torch.Tensor
    std: torch.Tensor
    reduction: Reduction

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:
        """Actions x_{t-1}, float32 `(N, C, H, W)`, without gradient."""
        mean = self.mean.detach()
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return mean + self.std * noise

    def log_prob(self, action: torch.Tensor) -> torch.Tensor:
        """Log-probability `(N,)` of actions `(N, C, H, W)`; 0 at deterministic steps."""
        return gaussian_log_prob(action, self.mean, self.std, self.reduction)

    def kl(self, other: DenoisingDistribution, *, denominator: bool = True) -> torch.Tensor:
        """KL divergence `(N,)` to a distribution of equal std, ||mu - mu'||^2 / (2 sigma^2), summed over dimensions.

        Args:
            other: the distribution to compare with.
            denominator: False leaves out 2 sigma^2; see `gaussian_kl`.
        """
        return gaussian_kl(self.mean, other.mean, self.std, denominator=denominator)

    def entropy(self) -> torch.Tensor:
        """Entropies `(N,)`, reduced like log-probabilities; constant, because sigma_t is; 0 at deterministic steps."""
        std = self.std.flatten()
        per_dimension = torch.where(std > 0, std, 1.0).log() + 0.5 * math.log(2 * math.pi * math.e)
        per_dimension = torch.where(std > 0, per_dimension, 0.0)
        return per_dimension if self.reduction == "mean" else per_dimension * self.dimensions

    @property
    def dimensions(self) -> int:
        """D = C * H * W."""
        return self.mean[0].numel()
