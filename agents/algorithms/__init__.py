"""The learning algorithms: one file each, found by name in `AGENTS`; a new file in this folder is found by itself."""

from __future__ import annotations

import importlib
import pkgutil

from diffusion_gym.agents.algorithms.base import AGENTS, Agent, AgentConfig, NoUsableReward, agent_class

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

from diffusion_gym.agents.algorithms.ddpo_is import DDPOIS  # noqa: E402 - after the others are registered
from diffusion_gym.agents.algorithms.ddpo_iskl import DDPOISKL  # noqa: E402
from diffusion_gym.agents.algorithms.ddpo_sf import DDPOSF  # noqa: E402
from diffusion_gym.agents.algorithms.dpok import DPOK  # noqa: E402
from diffusion_gym.agents.algorithms.rwr import RWR  # noqa: E402
from diffusion_gym.agents.algorithms.rwr_sparse import SparseRWR  # noqa: E402

__all__ = [
    "AGENTS",
    "DDPOIS",
    "DDPOISKL",
    "DDPOSF",
    "DPOK",
    "RWR",
    "Agent",
    "AgentConfig",
    "NoUsableReward",
    "SparseRWR",
    "agent_class",
]
