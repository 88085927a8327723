"""Rewards that must not fall: floors under a reward's components, held by Lagrange multipliers.

In place of r an agent learns from the Lagrangian of `max E[r] subject to E[c_k] >= f_k`, divided by 1 + sum of lambda_k
so that its scale stays (Ray et al. 2019, "Benchmarking Safe Exploration in Deep Reinforcement Learning"):

    r' = (r + sum_k lambda_k s_r / s_k (c_k - f_k)) / (1 + sum_k lambda_k)
    lambda_k <- max(0, lambda_k + floor_step (f_k - mean c_k) / s_k)   after each iteration

The standard deviations s are those of the first iteration, so that the multipliers have no units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Final, cast

from gymnasium.vector import VectorEnv
from pydantic import Field

from diffusion_gym.agents.finite import Options, require
from diffusion_gym.agents.processes import Processes
from diffusion_gym.agents.rollout import Trajectories
from diffusion_gym.envs.vector import DenoisingVectorEnv
from diffusion_gym.registry import unknown_name
from diffusion_gym.rewards.time_limit import TimeLimited
from diffusion_gym.rewards.weighted import WeightedSum
from diffusion_gym.schemas import Schema

_NO_SPREAD: Final = 1e-6  # a standard deviation below it says nothing of the scale


@dataclass(frozen=True)
class RewardFloorOptions(Options):
    """Which components of the reward must not fall below what."""

    reward_floors: tuple[str, ...] = ()
    """Components of the reward, each NAME=VALUE, whose mean must not fall below the value: a Lagrange multiplier adds
    as much of a component to what is learned from as that takes. Parts of a weighted sum, which may have weight 0."""
    floor_step: float = 0.1
    """What a multiplier changes by in an iteration whose component is one standard deviation below its floor."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "larger than 0", "floor_step")
        others: tuple[str, ...] = getattr(self, "component_weights", ())
        if self.values_of_floors() and others:
            raise ValueError(
                "reward_floors changes the reward, which component_weights puts aside; give one of the two"
            )

    def values_of_floors(self) -> dict[str, float]:
        """The floors by name of component.

        Raises:
            ValueError: `reward_floors` has an entry that is not NAME=VALUE, or a name twice.
        """
        floors: dict[str, float] = {}
        for entry in self.reward_floors:
            name, _, text = entry.rpartition("=")
            try:
                value = float(text)
            except ValueError:
                value = math.nan
            if not name or name in floors or not math.isfinite(value):
                raise ValueError(f"reward_floors={entry!r} must be NAME=VALUE, each name once, such as CLIPScore=0.6")
            floors[name] = value
        return floors


class FloorsState(Schema):
    """The floors' part of a checkpoint: multipliers, and the standard deviations once they are known."""

    multipliers: dict[str, Annotated[float, Field(ge=0)]]
    deviations: dict[str, Annotated[float, Field(gt=0)]]


_REWARD: Final = ""  # stands for the reward itself among the deviations


class RewardFloors:
    """The multipliers of a training, the same in every process.

    Args:
        options: with the floors and the step.
        processes: that train together.

    Attributes:
        multipliers: by component.
    """

    def __init__(self, options: RewardFloorOptions, processes: Processes) -> None:
        self._floors, self._step, self._processes = options.values_of_floors(), options.floor_step, processes
        self.multipliers = dict.fromkeys(self._floors, 0.0)
        self._deviations: dict[str, float] = {}

    def __bool__(self) -> bool:
        return bool(self._floors)

    def check_env(self, env: VectorEnv[Any, Any, Any]) -> None:
        """Refuse a weighted sum without a component that has a floor; other rewards show theirs with the first scores.

        Raises:
            ValueError: the component.
        """
        reward: Any = cast(DenoisingVectorEnv, env.unwrapped).reward
        reward = reward.reward if isinstance(reward, TimeLimited) else reward
        if isinstance(reward, WeightedSum):
            for name in self._floors:
                if name.partition("/")[0] not in reward.rewards:
                    raise ValueError(unknown_name("reward_floors", name, list(reward.rewards)))

    def measure(self, trajectories: Trajectories) -> dict[str, float]:
        """Means of the components with a floor over all processes' finite values; the first call fixes the deviations.

        Raises:
            ValueError: the reward has no such component.
        """
        means = {}
        known = self._processes.gather_json(sorted(trajectories.components))
        columns = {_REWARD: trajectories.rewards}
        for name in self._floors:
            if any(name not in own for own in known):
                raise ValueError(unknown_name("reward_floors", name, known[0]))
            columns[name] = trajectories.components[name]
        for name, column in columns.items():
            values = self._processes.gather(column.double()).cpu()
            values = values[values.isfinite()]
            means[name] = float(values.mean())
            if name not in self._deviations and len(values):
                deviation = float(values.std(correction=0))
                self._deviations[name] = deviation if deviation > _NO_SPREAD else 1.0
        return {name: means[name] for name in self._floors}

    def constrained(self, trajectories: Trajectories) -> Trajectories:
        """The same with the Lagrangian in place of the reward; what a multiplier of 0 belongs to does not count."""
        active = {name: value for name, value in self.multipliers.items() if value}
        if not active:
            return trajectories
        total = trajectories.rewards
        for name, multiplier in active.items():
            factor = multiplier * self._deviations[_REWARD] / self._deviations[name]
            total = total + factor * (trajectories.components[name] - self._floors[name])
        return replace(trajectories, rewards=total / (1.0 + sum(active.values())))

    def advance(self, means: Mapping[str, float]) -> dict[str, float]:
        """Change the multipliers after an iteration with these means; returns those that it was learned with."""
        used = {f"{name}_multiplier": value for name, value in self.multipliers.items()}
        for name, mean in means.items():
            if math.isfinite(mean):
                below = (self._floors[name] - mean) / self._deviations[name]
                self.multipliers[name] = max(0.0, self.multipliers[name] + self._step * below)
        return used

    def state(self) -> dict[str, dict[str, float]]:
        """The multipliers and deviations, for a checkpoint."""
        return {"multipliers": dict(self.multipliers), "deviations": dict(self._deviations)}

    def load(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Put back what `state` gave.

        Raises:
            ValueError: it is of other floors.
        """
        if set(state["multipliers"]) != set(self._floors) or not set(state["deviations"]) <= {_REWARD, *self._floors}:
            raise ValueError(f"its multipliers are of {sorted(state['multipliers'])}, not of {sorted(self._floors)}")
        self.multipliers, self._deviations = dict(state["multipliers"]), dict(state["deviations"])
