"""Policies and learning algorithms for the denoising environments."""

from diffusion_gym.agents.distribution import DenoisingDistribution
from diffusion_gym.agents.policy import DenoisingPolicy

__all__ = ["DenoisingDistribution", "DenoisingPolicy"]
