"""The learning algorithms: one file each, found by name in `AGENTS`; a new file in this folder is found by itself.

All that an agent of your own needs can be imported from here; docs/custom-agents.md says how to write one.
"""

from __future__ import annotations

import importlib
import pkgutil

from diffusion_gym.agents.algorithms.base import (
    AGENTS,
    Agent,
    AgentConfig,
    NoUsableReward,
    agent_class,
    part_of,
)
from diffusion_gym.agents.algorithms.forward_process import (
    ForwardProcessAgent,
    ForwardProcessConfig,
    NoisedPictures,
)
from diffusion_gym.agents.algorithms.metrics import Metrics, averages, update_metrics
from diffusion_gym.agents.algorithms.policy_gradient import PolicyGradientAgent, PolicyGradientConfig, Transitions
from diffusion_gym.agents.finite import Diverged
from diffusion_gym.agents.optimization import Losses
from diffusion_gym.agents.rollout import Trajectories, collect_many

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

from diffusion_gym.agents.algorithms.awm import AWM  # noqa: E402 - after the others are registered
from diffusion_gym.agents.algorithms.ddpo_is import DDPOIS  # noqa: E402
from diffusion_gym.agents.algorithms.ddpo_iskl import DDPOISKL  # noqa: E402
from diffusion_gym.agents.algorithms.ddpo_sf import DDPOSF  # noqa: E402
from diffusion_gym.agents.algorithms.dgpo import DGPO  # noqa: E402
from diffusion_gym.agents.algorithms.dpok import DPOK  # noqa: E402
from diffusion_gym.agents.algorithms.nft import NFT  # noqa: E402
from diffusion_gym.agents.algorithms.online_dpo import OnlineDPO  # noqa: E402
from diffusion_gym.agents.algorithms.reward_gradient import RewardGradient  # noqa: E402
from diffusion_gym.agents.algorithms.rwr import RWR  # noqa: E402
from diffusion_gym.agents.algorithms.rwr_sparse import SparseRWR  # noqa: E402

__all__ = [
    "AGENTS",
    "AWM",
    "Agent",
    "AgentConfig",
    "DDPOIS",
    "DDPOISKL",
    "DDPOSF",
    "DGPO",
    "DPOK",
    "Diverged",
    "ForwardProcessAgent",
    "ForwardProcessConfig",
    "Losses",
    "Metrics",
    "NFT",
    "NoUsableReward",
    "NoisedPictures",
    "OnlineDPO",
    "PolicyGradientAgent",
    "PolicyGradientConfig",
    "RWR",
    "RewardGradient",
    "SparseRWR",
    "Trajectories",
    "Transitions",
    "agent_class",
    "averages",
    "collect_many",
    "part_of",
    "update_metrics",
]
