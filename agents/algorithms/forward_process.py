"""What the agents on finished pictures have in common: a behaviour policy samples, pictures noised anew are learned.

Such an agent sees prompt, x_0 and reward alone, so that any sampler will do, also a deterministic one of few steps. Its
states are those of pretraining, x_t = signal_t x_0 + noise_t eps with fresh eps, and its losses are made of the errors
of the network's predictions there.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from diffusion_gym.agents.algorithms.base import AgentConfig, AgentState
from diffusion_gym.agents.algorithms.metrics import Metrics
from diffusion_gym.agents.algorithms.minibatch import MinibatchAgent, MinibatchConfig, MinibatchState, Update
from diffusion_gym.agents.averaging import BehaviourOptions, BehaviourPolicy
from diffusion_gym.agents.finite import require
from diffusion_gym.agents.optimization import Losses
from diffusion_gym.agents.policy import DenoisingPolicy
from diffusion_gym.agents.processes import Processes, is_own
from diffusion_gym.agents.renoising import fresh_noise, prediction_targets, renoised_states, squared_error
from diffusion_gym.agents.rollout import Trajectories
from diffusion_gym.schemas import Count
from diffusion_gym.storage import joined, part_of


@dataclass(frozen=True)
class ForwardProcessConfig(BehaviourOptions, MinibatchConfig):
    """Options of the agents on finished pictures."""

    kl_weight: float = 1e-4
    """Weight of the distance to the pretrained model: the mean squared difference of the two networks' predictions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "at least 0", "kl_weight")


class ForwardProcessState(MinibatchState):
    """The gradient updates that the behaviour policy's decay depends on too."""

    behaviour_updates: Count


@dataclass(frozen=True)
class NoisedPictures:
    """M finished pictures noised anew.

    Attributes:
        observation: the states, as `DenoisingPolicy.distribution` takes them.
        clean: x_0, float32 `(M, C, H, W)`.
        target: what the network should predict, `(M, C, H, W)`.
        advantage: `(M,)`.
        level: weight of the noise in x_t, `(M, 1, 1, 1)`: t in a flow-matching model.
        fixed: by name, values `(M, ...)` that the update does not change; see `ForwardProcessAgent.fixed`.
    """

    observation: dict[str, torch.Tensor]
    clean: torch.Tensor
    target: torch.Tensor
    advantage: torch.Tensor
    level: torch.Tensor
    fixed: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class NoisedUpdate:
    """The pictures of a gradient update.

    Attributes:
        items: this process's (sample, step, row of the noise, place in the update), int64 `(m, 4)`.
        pairs: (sample, step) of all processes' items, int64 `(B, 2)`.
        at: the noised pictures of some items.
    """

    items: torch.Tensor
    pairs: torch.Tensor
    at: Callable[[torch.Tensor], NoisedPictures]


class ForwardProcessAgent(MinibatchAgent):
    """Gradient steps on the loss of a subclass, over finished pictures noised anew.

    Attributes:
        behaviour: the policy that samples, unless `behaviour_samples` says that the weights themselves do.
        follows_every_update: whether it follows the weights after each gradient update, or after each iteration.
    """

    Config: ClassVar[type[AgentConfig]] = ForwardProcessConfig
    State: ClassVar[type[AgentState]] = ForwardProcessState
    config: ForwardProcessConfig
    needs_stochastic_steps: ClassVar[bool] = False
    finished_only: bool = True
    follows_every_update: ClassVar[bool] = False

    def __init__(
        self, policy: DenoisingPolicy, config: ForwardProcessConfig, processes: Processes | None = None
    ) -> None:
        super().__init__(policy, config, processes)
        self.behaviour, self.behaviour_samples = BehaviourPolicy(self.parameters, config), True

    @abstractmethod
    def losses(self, batch: NoisedPictures) -> Losses:
        """What to minimise for M noised pictures, `loss` `(M,)`, and other entries `(M,)` for the metrics."""

    def predict(self, batch: NoisedPictures, *, reference: bool = False) -> torch.Tensor:
        """What is compared with the batch's `target`, `(M, C, H, W)`; of the pretrained model with `reference`."""
        return self.policy.prediction(batch.observation, reference=reference)

    def fixed(self, update: NoisedUpdate) -> dict[str, torch.Tensor]:
        """By name, values of the update's items that it does not change, `(B, ...)` by place; found before it.

        By default the behaviour policy's predictions and, where `kl_weight` asks for them, the pretrained model's.
        """
        with self.behaviour.applied():
            found = {"behaviour": self.evaluated(update, self.predict)}
        if self.config.kl_weight:
            found["reference"] = self.evaluated(update, partial(self.predict, reference=True))
        return found

    def at_start(self, update: NoisedUpdate) -> dict[str, torch.Tensor]:
        """The same of values that no update of the iteration changes, found before the first of several."""
        return {}

    def penalized(self, rows: Losses, prediction: torch.Tensor, batch: NoisedPictures) -> Losses:
        """The rows with the weighted distance to the pretrained model in `loss`, and with the distances themselves."""
        found = dict(rows)
        if self.config.kl_weight:
            distance = squared_error(prediction, batch.fixed["reference"])
            found["loss"] = found["loss"] + self.config.kl_weight * distance
            found["distance_to_reference"] = distance.detach()
        found["distance_to_behaviour"] = squared_error(prediction, batch.fixed["behaviour"]).detach()
        return found

    def evaluated(
        self,
        update: NoisedUpdate,
        values: Callable[[NoisedPictures], torch.Tensor],
        fixed: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """`values` `(M, ...)` of this process's items in micro-batches, without gradient: `(B, ...)` by place.

        Args:
            update: the items.
            values: of the pictures of some of them.
            fixed: values that are found already, `(B, ...)`, for `NoisedPictures.fixed`.
        """
        found = self.optimizer.evaluate(update.items, lambda part: values(_with_fixed(update, fixed or {}, part)))
        places = update.items[:, 3]
        if self.processes.in_step:  # a row that stands in has the place of another process's
            own = is_own(update.items)
            places, found = places[own], found[own]
        return found.new_zeros(len(update.pairs), *found.shape[1:]).index_copy(0, places, found)

    def sample(self, env: VectorEnv[Any, Any, Any], number: int, seed_path: tuple[int, ...]) -> Trajectories:
        """Finished latents only, sampled by the behaviour policy; see `MinibatchAgent.sample`."""
        with self.behaviour.applied() if self.behaviour_samples else nullcontext():
            return super().sample(env, number, seed_path)

    def update(self, trajectories: Trajectories, rng: np.random.Generator) -> Metrics:
        """Minibatch updates on one iteration's pictures, then the behaviour policy follows; see `Agent.update`."""
        metrics = super().update(trajectories, rng)
        if not self.follows_every_update:
            self.behaviour.update()
        return {**metrics, "behaviour_decay": self.behaviour.current_decay}

    def updates(
        self,
        trajectories: Trajectories,
        advantages: torch.Tensor,
        minibatches: list[torch.Tensor],
        rng: np.random.Generator,
    ) -> Iterator[Update]:
        """Updates on the pictures of such pairs, each noised with noise of its own."""
        drawn = [(pairs, int(rng.integers(2**62))) for pairs in minibatches]  # the noise is drawn twice, not stored
        noised = partial(self.noised, trajectories, advantages)
        several = len(drawn) > 1 and type(self).at_start is not ForwardProcessAgent.at_start
        started = [self.at_start(noised(*each)) if several else {} for each in drawn]
        for each, start in zip(drawn, started, strict=True):
            update = noised(*each)
            yield update.items, self._losses_of(update, {**start, **self.fixed(update)}), len(update.pairs)

    def noised(
        self, trajectories: Trajectories, advantages: torch.Tensor, pairs: torch.Tensor, seed: int
    ) -> NoisedUpdate:
        """The pictures at `pairs` (sample, step), int64 `(B, 2)`, noised with the noise of `seed`."""
        rows, table = self.noise_rows(pairs), self.policy.table
        eps = fresh_noise(trajectories, int(rows.max()) + 1, seed)

        def at(items: torch.Tensor) -> NoisedPictures:
            samples, steps, row, _ = items.unbind(1)
            clean = trajectories.finished[samples]
            return NoisedPictures(
                renoised_states(table, trajectories, samples, steps, eps[row]),
                clean,
                prediction_targets(table, steps, clean, eps[row]),
                advantages[samples],
                table.noise[steps].view(-1, 1, 1, 1),
            )

        items = torch.cat([pairs, rows[:, None], torch.arange(len(pairs))[:, None]], dim=1)
        return NoisedUpdate(self.local(items, len(trajectories)), pairs, at)

    def noise_rows(self, pairs: torch.Tensor) -> torch.Tensor:
        """Which noise each of the pairs gets, int64 `(B,)` counted from 0; by default its own."""
        return torch.arange(len(pairs))

    def _losses_of(self, update: NoisedUpdate, fixed: Mapping[str, torch.Tensor]) -> Callable[[torch.Tensor], Losses]:
        return lambda items: self.losses(_with_fixed(update, fixed, items))

    def minimize(
        self, items: torch.Tensor, losses: Callable[[torch.Tensor], Losses], count: int
    ) -> dict[str, torch.Tensor]:
        """One gradient step on the policy, which the behaviour policy counts."""
        metrics = super().minimize(items, losses, count)
        self.behaviour.updates += 1
        if self.follows_every_update:
            self.behaviour.update()
        return metrics

    def learned(self) -> list[torch.Tensor]:
        """The behaviour policy too."""
        return [*super().learned(), *self.behaviour.average]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The behaviour policy too."""
        behaviour = self.behaviour.named(self.policy.trainable_parameters())
        return {**super().tensors(), **joined({"behaviour": behaviour})}

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put back what `tensors` gave."""
        super().load_tensors(tensors)
        self.behaviour.load(part_of(tensors, "behaviour"), self.policy.trainable_parameters())

    def state(self) -> dict[str, Any]:
        """The updates that the behaviour policy has counted too."""
        return {**super().state(), "behaviour_updates": self.behaviour.updates}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` gave."""
        super().load_state(state)
        self.behaviour.updates = state["behaviour_updates"]


def _with_fixed(update: NoisedUpdate, fixed: Mapping[str, torch.Tensor], items: torch.Tensor) -> NoisedPictures:
    """The pictures of some items, with their rows of the fixed values."""
    batch = update.at(items)
    batch.fixed.update({name: value[items[:, 3]] for name, value in fixed.items()})
    return batch
