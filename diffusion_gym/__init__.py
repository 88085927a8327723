"""The denoising process of a diffusion model as a Gymnasium environment.

Importing this package registers the environment ids; it imports neither diffusers nor transformers.
"""

from diffusion_gym._version import VERSION as __version__
from diffusion_gym.config import SamplerConfig
from diffusion_gym.envs.registration import register_all

__all__ = ["SamplerConfig", "__version__"]

register_all()
