"""Rollouts by any scheduler of diffusers, for agents that learn from finished pictures alone.

They need x_0 and its reward, and no log-probabilities: a solver of high order makes as good pictures in fewer steps
than the Markov chain of the environment, and without noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffusion_gym.agents.finite import Options
from diffusion_gym.agents.policy import DenoisingPolicy
from diffusion_gym.config import SolverName

if TYPE_CHECKING:
    from diffusion_gym.models.solvers import Solver


@dataclass(frozen=True)
class RolloutOptions(Options):
    """What makes the pictures that an agent learns from; evaluation has the environment's sampler."""

    rollout_scheduler: SolverName | str | None = None
    """Scheduler of diffusers that makes the pictures to learn from, in place of the environment's sampler: `dpm++`,
    `unipc`, `euler`, `heun`, or a class by its name. It needs no eta."""
    rollout_steps: int | None = None
    """Steps of rollout_scheduler; num_inference_steps of the environment by default."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rollout_steps is not None and self.rollout_scheduler is None:
            raise ValueError(
                f"rollout_steps={self.rollout_steps!r} is of rollout_scheduler, which is not given; give one, such as "
                "dpm++, or num_inference_steps of the environment"
            )


def solver_of(policy: DenoisingPolicy, options: RolloutOptions) -> Solver | None:
    """The solver that the options ask for, for `collect_many`; None for the environment's sampler.

    Raises:
        ValueError: an unknown scheduler, or one that cannot sample from the policy's model; too many steps.
    """
    if options.rollout_scheduler is None:
        return None
    from diffusion_gym.models.solvers import Solver

    steps = options.rollout_steps
    return Solver(
        policy.model, options.rollout_scheduler, policy.config.num_inference_steps if steps is None else steps
    )
