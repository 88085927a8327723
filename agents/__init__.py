"""Policies and learning algorithms for the denoising environments."""

from diffusion_gym.agents.policy import DenoisingDistribution, DenoisingPolicy

__all__ = ["DenoisingDistribution", "DenoisingPolicy"]
