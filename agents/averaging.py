"""Moving averages of the weights: for evaluation, and as the behaviour policy, which samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from diffusion_gym.agents.finite import Options, require
from diffusion_gym.devices import local_part, put


class WeightAverage:
    """An exponential moving average of weights: average <- decay * average + (1 - decay) * weights.

    Args:
        parameters: the weights to follow.
        decay: 0 to 1; 0 is no averaging at all.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = list(parameters), decay
        self.average = [parameter.detach().clone() for parameter in self.parameters] if decay else []

    def update(self) -> None:
        """Follow the weights by one step."""
        if self.decay:
            self.follow(self.decay)

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Follow the weights by one step of another decay; with 0 the average becomes the weights, bit for bit."""
        weights = [local_part(parameter.detach()) for parameter in self.parameters]
        torch._foreach_lerp_([local_part(value) for value in self.average], weights, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the average stands in for the weights."""
        if not self.average:
            yield
            return
        weights = [parameter.detach().clone() for parameter in self.parameters]
        self._put(self.average)
        try:
            yield
        finally:
            self._put(weights)

    def named(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The average by the names of the weights, for a checkpoint."""
        return dict(zip(names, self.average, strict=True))

    def load(self, stored: Mapping[str, torch.Tensor], names: Iterable[str]) -> None:
        """Put back what `named` gave."""
        for name, value in self.named(names).items():
            put(value, stored[name])

    def _put(self, values: Sequence[torch.Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            put(parameter, value)


@dataclass(frozen=True)
class BehaviourOptions(Options):
    """The behaviour policy; the defaults are those of DiffusionNFT's code, `decay_type` 1."""

    behaviour_decay: float = 0.5
    """Largest decay of the behaviour policy, a moving average of the weights that follows them from iteration to
    iteration; 0 makes it the weights at the begin of the iteration."""
    behaviour_growth: float = 1e-3
    """By how much that decay grows with each gradient update, from 0."""
    behaviour_delay: int = 0
    """Gradient updates before it begins to grow."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "at least 0 and less than 1", "behaviour_decay")
        require(self, "at least 0", "behaviour_growth", "behaviour_delay")


class BehaviourPolicy(WeightAverage):
    """The moving average of the weights that samples, whose decay grows as the training goes on.

    DiffusionNFT, arXiv:2509.16117: an average that is too fast is unstable, one that is too slow learns
    slowly, and what suits the begin of a training does not suit its end.

    Args:
        parameters: the weights to follow.
        options: how.

    Attributes:
        updates: gradient updates so far; part of a checkpoint, as the average is.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], options: BehaviourOptions) -> None:
        super().__init__(parameters, 1.0)  # which makes the copy
        self.options, self.updates = options, 0

    @property
    def current_decay(self) -> float:
        """min(growth (k - delay), largest decay) after k updates, not below 0."""
        grown = self.options.behaviour_growth * max(0, self.updates - self.options.behaviour_delay)
        return min(grown, self.options.behaviour_decay)

    def update(self) -> None:
        """Follow the weights by one step of the current decay."""
        self.follow(self.current_decay)
