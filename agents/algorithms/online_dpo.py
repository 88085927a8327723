"""Online DPO: the best picture of each group is preferred to its worst one, in the logistic loss of preferences.

Diffusion-DPO (arXiv:2311.12908, equation 14) compares denoising errors, at the same noise and step; D3PO
(arXiv:2311.13231) compares log-probabilities of the steps that were sampled. Both are the group preference
of `dgpo` with a group of two and advantages of +-1. In groups of two with rewards of 0 and 1 it takes preferences that
people gave.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from diffusion_gym.agents.advantages import best_and_worst
from diffusion_gym.agents.algorithms.base import AGENTS, AgentConfig
from diffusion_gym.agents.algorithms.dgpo import GroupPreferenceAgent, GroupPreferenceConfig
from diffusion_gym.agents.algorithms.forward_process import NoisedPictures, NoisedUpdate
from diffusion_gym.agents.finite import require_choice
from diffusion_gym.agents.policy import DenoisingPolicy
from diffusion_gym.agents.processes import Processes
from diffusion_gym.agents.rollout import Trajectories, trained_steps

PreferenceForm = Literal["denoising_error", "step"]


@dataclass(frozen=True)
class OnlineDPOConfig(GroupPreferenceConfig):
    """Options of online DPO; rewards are compared, not normalised, so `normalization` is not used."""

    form: PreferenceForm = "denoising_error"
    """What is compared: errors on the finished pictures noised anew (Diffusion-DPO), or the log-probabilities of the
    steps that were sampled (D3PO), which need a stochastic sampler."""
    kl_weight: float = 0.0
    """Weight of the distance to the pretrained model, besides what the preference does."""
    behaviour_decay: float = 0.0
    """Largest decay of the behaviour policy; 0 samples with the weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self, "form", PreferenceForm)
        if self.form == "step" and self.rollout_scheduler is not None:
            raise ValueError(
                f"rollout_scheduler={self.rollout_scheduler!r} takes other steps than the policy, which form='step' "
                "compares; leave it out, or use form='denoising_error'"
            )


@AGENTS.register("online_dpo")
class OnlineDPO(GroupPreferenceAgent):
    """-log sigmoid(-beta / 2 [(d_w - d_w,ref) - (d_l - d_l,ref)]) of the best w and the worst l of each group."""

    Config: ClassVar[type[AgentConfig]] = OnlineDPOConfig
    config: OnlineDPOConfig

    def __init__(self, policy: DenoisingPolicy, config: OnlineDPOConfig, processes: Processes | None = None) -> None:
        if config.form == "step":
            policy.require_noise()
        super().__init__(policy, config, processes)
        self.finished_only = config.form == "denoising_error"
        if config.form == "step":
            self.steps = trained_steps(policy.table, config.trained_steps)

    @property
    def compared(self) -> int:
        """Two, whatever the group."""
        return 2

    def advantages(self, trajectories: Trajectories) -> np.ndarray:
        """1 for the best of each group, -1 for the worst, NaN for the others: `(N,)`; see `best_and_worst`."""
        return best_and_worst(self.rewards(trajectories)[1], self.config.group_size)

    def predict(self, batch: NoisedPictures, *, reference: bool = False) -> torch.Tensor:
        """Of steps the mean of the Gaussian in units of sqrt(2) sigma: the error is -log p up to a constant."""
        if self.config.form == "denoising_error":
            return super().predict(batch, reference=reference)
        policy = self.policy
        gaussian = (policy.reference_distribution if reference else policy.distribution)(batch.observation)
        return gaussian.mean / batch.level

    def noised(
        self, trajectories: Trajectories, advantages: torch.Tensor, pairs: torch.Tensor, seed: int
    ) -> NoisedUpdate:
        """The pictures noised anew; or the transitions that were sampled, `level` being sqrt(2) sigma."""
        update = super().noised(trajectories, advantages, pairs, seed)
        if self.config.form == "denoising_error":
            return update

        def at(items: torch.Tensor) -> NoisedPictures:
            samples, steps, _, _ = items.unbind(1)
            action, scale = trajectories.actions(samples, steps), 2**0.5 * self.policy.table.sigma[steps]
            states, scale = trajectories.states(samples, steps), scale.view(-1, 1, 1, 1)
            return NoisedPictures(states, trajectories.finished[samples], action / scale, advantages[samples], scale)

        return NoisedUpdate(update.items, update.pairs, at)
