"""How long a training goes on, and in which rhythm it writes what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

# Training pictures for each development sample: from one evaluation to the next, and in the shortest run that has any.
# An evaluation takes the time of training on about as many pictures as it samples: less than 5 % either way.
_BETWEEN: Final = 40
_SHORTEST: Final = 60


@dataclass(frozen=True)
class Schedule:
    """How long a run goes on and what it writes on the way."""

    total_reward_queries: int = 50_000
    """Pictures to score in training before the run ends; the DDPO paper goes to 50k."""
    samples_per_iteration: int = 256
    """Trajectories sampled before each round of updates; a multiple of the rollout's batch."""
    checkpoint_every: int = 10
    """Iterations between two checkpoints; the last one is always written."""
    pictures_every: int = 10
    """Iterations between two grids of pictures from the same noise; 0 for none but the first and last."""
    keep_checkpoints: int = 2
    """Checkpoints kept."""
    development_every: int | None = None
    """Iterations between two evaluations of the development set, also evaluated at the end; 0 for none. By default one
    in 40 * development_samples reward queries, and none in a run of fewer than 60 * development_samples."""
    development_samples: int = 64
    """Fixed noises of the development set, whose pictures and rewards are followed through the training."""
    development_paths: int = 16
    """Of these, how many have the reward computed along the whole trajectory: T + 1 reward calls each."""

    def __post_init__(self) -> None:
        for name in ("total_reward_queries", "samples_per_iteration", "checkpoint_every", "keep_checkpoints"):
            _check_least(name, getattr(self, name), 1)
        _check_least("development_samples", self.development_samples, 1)
        for name in ("pictures_every", "development_every", "development_paths"):
            _check_least(name, getattr(self, name) or 0, 0)

    @property
    def planned_reward_queries(self) -> int:
        """`total_reward_queries` in whole iterations, rounded up."""
        return -(-self.total_reward_queries // self.samples_per_iteration) * self.samples_per_iteration

    @property
    def development_interval(self) -> int:
        """`development_every`, or what stands for it where it is None; 0 for no development set."""
        if self.development_every is not None:
            return self.development_every
        if self.planned_reward_queries < _SHORTEST * self.development_samples:
            return 0
        return -(-_BETWEEN * self.development_samples // self.samples_per_iteration)


def _check_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}={value!r} must be at least {least}")
