"""Sparse RWR: the denoising loss on the best of the model's own samples (DDPO, section C.2 and appendix F.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from diffusion_gym.agents.advantages import threshold_weights
from diffusion_gym.agents.algorithms.base import AGENTS, AgentConfig
from diffusion_gym.agents.algorithms.rwr import RegressionAgent, RegressionConfig


@dataclass(frozen=True)
class SparseRWRConfig(RegressionConfig):
    """Options of sparse RWR."""

    percentile: float = 0.9
    """The samples of a prompt below this quantile of its rewards are left out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.percentile < 1:
            raise ValueError(f"percentile={self.percentile!r} must be at least 0 and less than 1")


@AGENTS.register("rwr_sparse")
class SparseRWR(RegressionAgent):
    """Reward-weighted regression with weights 0 and 1."""

    Config: ClassVar[type[AgentConfig]] = SparseRWRConfig
    config: SparseRWRConfig

    def weights(self, prompts: Sequence[str], rewards: np.ndarray) -> np.ndarray:
        """1 for the samples at or above their prompt's percentile, else 0."""
        return threshold_weights(prompts, rewards, self.config.percentile)
