"""The learning algorithms: one file each, found by name in `AGENTS`; a new file in this folder is found by itself."""

from __future__ import annotations

import importlib
import pkgutil

from diffusion_gym.agents.algorithms.base import AGENTS, Agent, AgentConfig, NoUsableReward

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

from diffusion_gym.agents.algorithms.ddpo_is import DDPOIS  # noqa: E402 - after the others are registered

__all__ = ["AGENTS", "DDPOIS", "Agent", "AgentConfig", "NoUsableReward"]
