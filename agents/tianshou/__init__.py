"""Tianshou drives the environment and expresses DDPO; see docs/tianshou.md."""

from __future__ import annotations

try:
    import tianshou  # noqa: F401
except ImportError as error:
    raise ImportError("tianshou is not installed; pip install 'diffusion-denoise-gym[tianshou]'") from error

from diffusion_gym.agents.tianshou.collector import TrajectoryCollector
from diffusion_gym.agents.tianshou.ddpo import (
    DDPOPPO,
    AdamWFactory,
    DDPOReinforce,
    TrajectoryRewards,
    ddpo_is,
    ddpo_sf,
)
from diffusion_gym.agents.tianshou.env import TianshouVectorEnv
from diffusion_gym.agents.tianshou.files import load, save
from diffusion_gym.agents.tianshou.policy import GuidedActor, GuidedGaussian, GuidedPolicy, ValueCritic, ZeroCritic

__all__ = [
    "AdamWFactory",
    "DDPOPPO",
    "DDPOReinforce",
    "GuidedActor",
    "GuidedGaussian",
    "GuidedPolicy",
    "TianshouVectorEnv",
    "TrajectoryCollector",
    "TrajectoryRewards",
    "ValueCritic",
    "ZeroCritic",
    "ddpo_is",
    "ddpo_sf",
    "load",
    "save",
]
