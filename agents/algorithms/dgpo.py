"""Direct Group Preference Optimization (DGPO, arXiv:2510.08425): DPO between the good and the bad of a group.

The pictures of a prompt with positive advantage are preferred, as a group and weighted by it, to those with negative
advantage. Advantages that sum up to 0 in a group make the partition function cancel, so that a logistic loss of
denoising errors is left, without likelihoods. All of a group share noise and step. Details follow the authors' code,
Luo-Yihong/DGPO, scripts/train_sd3_dgpo.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import torch

from diffusion_gym.agents.advantages import Normalization
from diffusion_gym.agents.algorithms.base import AGENTS, AgentConfig
from diffusion_gym.agents.algorithms.forward_process import (
    ForwardProcessAgent,
    ForwardProcessConfig,
    NoisedPictures,
    NoisedUpdate,
)
from diffusion_gym.agents.finite import require, require_choice
from diffusion_gym.agents.optimization import Losses
from diffusion_gym.agents.renoising import squared_error

Reference = Literal["pretrained", "behaviour"]


@dataclass(frozen=True)
class GroupPreferenceConfig(ForwardProcessConfig):
    """Options of the agents that compare within groups."""

    normalization: Normalization = "group"
    """What rewards are normalised by to give advantages; those of a group should sum up to 0."""
    group_size: int = 2
    """Samples in a row that share a prompt, and are compared."""
    batch_size: int = 64
    """Trajectories behind one gradient update: as many whole groups as fit, at least one."""
    preference_scale: float = 100.0
    """beta, the scale of differences of errors in the logistic loss."""
    reference: Reference = "pretrained"
    """Whose errors those of the network are compared with: the pretrained model's, or the behaviour policy's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "larger than 0", "preference_scale")
        require_choice(self, "reference", Reference)
        if self.group_size < 2:
            raise ValueError(f"group_size={self.group_size!r} must be at least 2: a group is what is compared")


class GroupPreferenceAgent(ForwardProcessAgent):
    """Logistic losses of errors, summed up over a group with its advantages as weights."""

    Config: ClassVar[type[AgentConfig]] = GroupPreferenceConfig
    config: GroupPreferenceConfig

    @property
    def compared(self) -> int:
        """G, how many samples a preference is between."""
        return self.config.group_size

    def minibatches(self, usable: np.ndarray, rng: np.random.Generator) -> list[torch.Tensor]:
        """Pairs (sample, step) of each update: all usable samples of a group at the same steps."""
        size = self.config.group_size
        number, groups = max(1, self.config.batch_size // size), np.unique(usable // size)
        found = []
        for order in (rng.permutation(groups) for _ in range(self.config.inner_epochs)):
            for start in range(0, len(order), number):
                drawn = self.transitions(order[start : start + number], rng).repeat_interleave(size, 0)
                drawn[:, 0] = drawn[:, 0] * size + torch.arange(len(drawn)) % size
                found.append(drawn[torch.isin(drawn[:, 0], torch.from_numpy(usable))])
        return found

    def noise_rows(self, pairs: torch.Tensor) -> torch.Tensor:
        """One noise for all of a group at a step."""
        keys = torch.stack([pairs[:, 0] // self.config.group_size, pairs[:, 1]], 1)
        return keys.unique(dim=0, return_inverse=True)[1]

    def fixed(self, update: NoisedUpdate) -> dict[str, torch.Tensor]:
        """The weight of each group too: sigmoid(beta / G sum_i A_i (d_i - d_ref,i)), d being the squared errors.

        A group is one process's, because it is sampled in one batch.
        """
        found = super().fixed(update)
        if not len(update.items):
            return found
        if self.config.reference == "pretrained" and "reference" not in found:
            found["reference"] = self.evaluated(update, partial(self.predict, reference=True))
        margin = self.evaluated(update, self._margin, found)
        rows, places = update.items[:, 2], update.items[:, 3]
        sums = margin.new_zeros(len(update.pairs)).index_add(0, rows, margin[places])
        sums = sums * self.config.preference_scale / self.compared
        return {**found, "margin": torch.zeros_like(margin).index_copy(0, places, sums[rows])}

    def _margin(self, batch: NoisedPictures) -> torch.Tensor:
        """A (d - d_ref), `(M,)`."""
        reference = batch.fixed[_PREDICTIONS[self.config.reference]]
        error = squared_error(self.predict(batch), batch.target)
        return batch.advantage * (error - squared_error(reference, batch.target))

    def bounded(self, error: torch.Tensor, batch: NoisedPictures) -> Losses:
        """The errors `(M,)` as `loss`, without gradient where one must not go on, and entries for the metrics."""
        return {"loss": error}

    def losses(self, batch: NoisedPictures) -> Losses:
        """w_g A d + lambda |v - v_ref|^2; the gradient is that of -log sigmoid(-margin) of the group, over beta / G."""
        prediction = self.predict(batch)
        rows = dict(self.bounded(squared_error(prediction, batch.target), batch))
        rows["loss"] = batch.fixed["margin"].sigmoid() * batch.advantage * rows["loss"]
        preference = torch.nn.functional.softplus(batch.fixed["margin"])  # -log sigmoid(-margin)
        return self.penalized({**rows, "preference_loss": preference}, prediction, batch)


_PREDICTIONS = {"pretrained": "reference", "behaviour": "behaviour"}


@dataclass(frozen=True)
class DGPOConfig(GroupPreferenceConfig):
    """Options of DGPO; the defaults are those of the authors' `geneval_sd3_4gpu`."""

    clip_range: float = 1e-2
    """Errors have no gradient once exp(d_behaviour - d) is beyond 1 +- this in the advantage's direction."""
    kl_weight: float = 0.02
    """Weight of the distance to the pretrained model: the mean squared difference of the two networks' predictions."""
    behaviour_decay: float = 0.3
    """Largest decay of the behaviour policy, which follows the weights after each update."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "larger than 0", "clip_range")


@AGENTS.register("dgpo")
class DGPO(GroupPreferenceAgent):
    """Group preferences, with PPO's clipping by the behaviour policy."""

    Config: ClassVar[type[AgentConfig]] = DGPOConfig
    config: DGPOConfig
    follows_every_update: ClassVar[bool] = True

    def bounded(self, error: torch.Tensor, batch: NoisedPictures) -> Losses:
        """The errors, fixed where the ratio to the behaviour policy left the clip range in A's direction."""
        ratio = (squared_error(batch.fixed["behaviour"], batch.target) - error).exp().detach()
        bound, good = self.config.clip_range, batch.advantage > 0
        beyond = torch.where(good, ratio > 1 + bound, ratio < 1 - bound)
        return {"loss": torch.where(beyond, error.detach(), error), "clip_fraction": beyond.float()}
