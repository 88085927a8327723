"""An agent of your own: RLOO, REINFORCE with a leave-one-out baseline (arXiv:2402.14740).

k samples of a prompt are drawn together; each is compared with the mean reward of the other k - 1. In this folder:

    python custom_agent.py
    diffusion-gym train --env DiffusionDenoise-Shapes-Location-v0 --preset shapes-demo --agent custom_agent:RLOO \
        --agent.group-size 8 --samples-per-iteration 32 --rollout-batch 32 --out runs/rloo
    diffusion-gym eval runs/rloo
"""

import sys
from dataclasses import dataclass

import numpy as np
import torch

from diffusion_gym.agents.algorithms import Agent, AgentConfig, Trajectories, Transitions, collect_many, update_metrics
from diffusion_gym.agents.cli import main


def leave_one_out(rewards: np.ndarray, group_size: int) -> np.ndarray:
    """Each reward `(N,)` less the mean of the others of its group; NaN where either is missing."""
    groups = np.where(np.isfinite(rewards), rewards, np.nan).reshape(-1, group_size)
    others = np.isfinite(groups).sum(1, keepdims=True) - 1
    with np.errstate(invalid="ignore", divide="ignore"):
        return (groups - (np.nansum(groups, 1, keepdims=True) - groups) / others).reshape(-1)


@dataclass(frozen=True)
class RLOOConfig(AgentConfig):
    """Options of RLOO: the command line has each as `--agent.NAME`, with the line below it as its help."""

    group_size: int = 4
    """k, samples in a row that share a prompt; it divides the rollout's batch."""
    advantage_clip: float = 1.0
    """Advantages are clipped to +- this."""

    def __post_init__(self) -> None:
        """Refuse what cannot work, by name."""
        super().__post_init__()
        if self.group_size < 2:
            raise ValueError(f"group_size={self.group_size!r} must be at least 2: the others are the baseline")
        if not self.advantage_clip > 0:
            raise ValueError(f"advantage_clip={self.advantage_clip!r} must be larger than 0")


class RLOO(Agent):
    """One exact policy-gradient update on all samples of each iteration."""

    Config = RLOOConfig

    def sample(self, env, number, seed_path) -> Trajectories:
        """Trajectories in groups that share a prompt."""
        size = self.config.group_size
        return collect_many(env, self.policy, number, seed_path, group_size=size, processes=self.processes)

    def update(self, trajectories, rng) -> dict[str, float]:
        """REINFORCE on all trained steps of all samples."""
        _, rewards = self.rewards(trajectories)  # of all processes, as are the advantages
        bound = self.config.advantage_clip
        advantages = leave_one_out(rewards, self.config.group_size).clip(-bound, bound)
        usable = np.flatnonzero(np.isfinite(advantages))
        local = self.local_values(advantages, trajectories)

        def losses(pairs: torch.Tensor) -> dict[str, torch.Tensor]:
            batch = Transitions.at(trajectories, local, pairs)
            return {"loss": -batch.advantage * self.policy(batch.observation, batch.action)}

        pairs = self.transitions(usable, rng)  # (sample, step)
        row = self.minimize(self.local(pairs, len(trajectories)), losses, len(pairs))
        return {
            **update_metrics([row]),
            "advantage_std": float(advantages[usable].std()),
            "samples_dropped": len(advantages) - len(usable),
        }


if __name__ == "__main__":
    demo = "train --agent custom_agent:RLOO --env DiffusionDenoise-Shapes-Location-v0 --preset shapes-demo"
    short = "--samples-per-iteration 32 --rollout-batch 32 --total-reward-queries 2560 --out runs/custom-agent"
    main([*demo.split(), *short.split(), *sys.argv[1:]])
