"""What third parties test with: the rules of a vector environment, and models and rewards with random weights."""

from diffusion_gym.testing.conformance import check_vector_env

__all__ = ["check_vector_env"]
