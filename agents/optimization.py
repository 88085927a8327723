"""From losses to new weights: micro-batches, gradient sums, clipping, AdamW, learning-rate schedule, averaging."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from diffusion_gym.agents.finite import require, require_finite_options
from diffusion_gym.agents.processes import Processes
from diffusion_gym.storage import optimizer_tensors, restore_optimizer
from diffusion_gym.timing import span

LearningRateSchedule = Literal["constant", "warmup_cosine"]
Losses = Mapping[str, torch.Tensor]
_Found = TypeVar("_Found")

_LARGEST_TRIED = 512


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW, its learning-rate schedule, gradient clipping and micro-batches.

    Attributes:
        learning_rate: the constant or peak learning rate.
        schedule: `constant`, or `warmup_cosine`, a linear warm-up followed by half a cosine.
        warmup_fraction: part of the training that warms up.
        first_learning_rate: where the warm-up begins.
        last_learning_rate: where the cosine ends.
        betas: moment decays of AdamW.
        epsilon: epsilon of AdamW.
        weight_decay: weight decay of AdamW.
        max_grad_norm: a longer gradient is scaled down to this norm.
        micro_batch_size: items in one forward and backward pass; 0 finds the largest that fits in memory.
        loss_scaling: scale losses against underflow, for float16.

    Raises:
        ValueError: an option out of its range, NaN and infinity included.
    """

    learning_rate: float
    schedule: LearningRateSchedule = "constant"
    warmup_fraction: float = 0.25
    first_learning_rate: float = 0.0
    last_learning_rate: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    micro_batch_size: int = 0
    loss_scaling: bool = False

    def __post_init__(self) -> None:
        require_finite_options(self)
        require(self, "larger than 0", "epsilon", "max_grad_norm")
        require(self, "at least 0", "learning_rate", "first_learning_rate", "last_learning_rate", "weight_decay")
        require(self, "at least 0 and less than 1", "betas")


def learning_rate_at(options: OptimizerOptions, fraction_done: float) -> float:
    """The learning rate when `fraction_done`, 0 to 1, of the training is over (thesis, figure 5.7)."""
    if options.schedule == "constant":
        return options.learning_rate
    if fraction_done < options.warmup_fraction:
        part = fraction_done / options.warmup_fraction
        return options.first_learning_rate + part * (options.learning_rate - options.first_learning_rate)
    part = min(1.0, (fraction_done - options.warmup_fraction) / (1 - options.warmup_fraction))
    height = options.learning_rate - options.last_learning_rate
    return options.last_learning_rate + height * 0.5 * (1 + math.cos(math.pi * part))


class AccumulatingOptimizer:
    """AdamW whose step is taken on the mean loss of many items: over micro-batches, and over processes.

    Args:
        parameters: what trains, by name.
        options: how.
        processes: the processes that share the items.
        largest_micro_batch: where the search for the micro-batch begins when the options say 0.

    Attributes:
        adam: torch's optimiser.
        fraction_done: how much of the training is over, 0 to 1: what the learning-rate schedule looks at.
        micro_batch_size: items in one pass; found by trying when the options say 0.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        options: OptimizerOptions,
        processes: Processes | None = None,
        largest_micro_batch: int = _LARGEST_TRIED,
    ) -> None:
        self.parameters, self.options = list(parameters.values()), options
        self.processes = processes or Processes()
        self.fraction_done = 0.0
        self.adam = torch.optim.AdamW(
            self.parameters,
            lr=options.learning_rate,
            betas=options.betas,
            eps=options.epsilon,
            weight_decay=options.weight_decay,
        )
        self.micro_batch_size = options.micro_batch_size or largest_micro_batch
        self._scaler = torch.amp.GradScaler(self.parameters[0].device.type, enabled=options.loss_scaling)

    def step(
        self, items: torch.Tensor, losses: Callable[[torch.Tensor], Losses], count: int
    ) -> dict[str, torch.Tensor]:
        """One update that minimises the mean of `losses(items)["loss"]`.

        Args:
            items: this process's items, rows of a tensor; there may be none.
            losses: the losses of a micro-batch of M items, each entry `(M,)`; `loss` is minimised, the others are
                reported.
            count: items of all processes together.

        Returns:
            The means of all entries over all items, `grad_norm` before clipping, and `learning_rate`; 0-dimensional.
            With loss scaling also `overflow`, 1 where the scaled gradient left the range of float16, so that the
            update was left out and the scale halved; `grad_norm` is 0 then.
        """
        totals = self._accumulate(items, losses, count)
        with span("optimiser"):
            return {**totals, **self._follow_gradient()}

    def _follow_gradient(self) -> dict[str, torch.Tensor]:
        """AdamW's step on the gradient that was summed up; the entries about it that `step` returns."""
        found: dict[str, torch.Tensor] = {}
        self._scaler.unscale_(self.adam)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.options.max_grad_norm)
        if self.options.loss_scaling:
            overflow = ~norm.isfinite()
            found["overflow"], norm = overflow.float(), norm.masked_fill(overflow, 0.0)
        rate = learning_rate_at(self.options, self.fraction_done)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self._scaler.step(self.adam)
        self._scaler.update()
        return {**found, "grad_norm": norm, "learning_rate": torch.tensor(rate, dtype=torch.float64)}

    def _accumulate(
        self, items: torch.Tensor, losses: Callable[[torch.Tensor], Losses], count: int
    ) -> dict[str, torch.Tensor]:
        """Gradients of the mean loss, summed over micro-batches and processes."""
        totals = self._fitting(items, lambda: self._passes(items, losses, count))
        if self.processes.count > 1:
            totals = self._over_processes(totals)
        return totals

    @torch.no_grad()
    def evaluate(self, items: torch.Tensor, values: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """`values(items)` `(M,)` in micro-batches, without a gradient.

        Args:
            items: M rows of a tensor; there may be none.
            values: the values of some items.
        """

        def passes() -> torch.Tensor:
            with span("training forward"):
                return torch.cat([values(part) for part in items.split(self.micro_batch_size)])

        return self._fitting(items, passes) if len(items) else self.parameters[0].new_zeros(0, dtype=torch.float32)

    def _fitting(self, items: torch.Tensor, passes: Callable[[], _Found]) -> _Found:
        """What `passes` gives; halves the micro-batch until it fits in memory."""
        while True:
            tried = min(self.micro_batch_size, len(items))
            try:
                return passes()
            except RuntimeError as error:
                if self.options.micro_batch_size or tried == 1 or not _out_of_memory(error):
                    raise
            self.micro_batch_size = tried // 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _passes(
        self, items: torch.Tensor, losses: Callable[[torch.Tensor], Losses], count: int
    ) -> dict[str, torch.Tensor]:
        self.adam.zero_grad(set_to_none=True)
        self._scaler.scale(self.parameters[0].new_zeros(()))  # makes the loss scale, which no item may need here
        totals: dict[str, torch.Tensor] = {}
        for part in items.split(self.micro_batch_size) if len(items) else ():
            with span("training forward"):
                rows = losses(part)
                loss = self._scaler.scale(rows["loss"].sum() / count)
            with span("training backward"):
                loss.backward()
            for key, value in rows.items():
                totals[key] = totals.get(key, 0.0) + value.detach().sum() / count
        return totals

    def _over_processes(self, totals: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for parameter in self.parameters:
            if parameter.grad is None:  # no item of this update was this process's
                parameter.grad = torch.zeros_like(parameter)
        self.processes.sum_([parameter.grad for parameter in self.parameters if parameter.grad is not None])
        rows = self.processes.gather_json({key: float(value) for key, value in totals.items()})
        names = list(dict.fromkeys(name for row in rows for name in row))
        return {name: torch.tensor(sum(row.get(name, 0.0) for row in rows)) for name in names}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Adam's moments, for a checkpoint."""
        return optimizer_tensors(self.adam)

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put back what `tensors` gave."""
        restore_optimizer(self.adam, tensors)

    def state(self) -> dict[str, Any]:
        """The micro-batch that was found and the loss scale, as JSON values."""
        return {"micro_batch_size": self.micro_batch_size, "loss_scale": self._scaler.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` gave; a micro-batch that the options fix stays."""
        self.micro_batch_size = self.options.micro_batch_size or state["micro_batch_size"]
        if state["loss_scale"]:
            self._scaler.load_state_dict(dict(state["loss_scale"]))


def _out_of_memory(error: RuntimeError) -> bool:
    from accelerate.utils.memory import should_reduce_batch_size

    return should_reduce_batch_size(error)


class WeightAverage:
    """An exponential moving average of weights: average <- decay * average + (1 - decay) * weights.

    Args:
        parameters: the weights to follow.
        decay: 0 to 1; 0 is no averaging at all.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = list(parameters), decay
        self.average = [parameter.detach().clone() for parameter in self.parameters] if decay else []

    @torch.no_grad()
    def update(self) -> None:
        """Follow the weights by one step."""
        if self.decay:
            torch._foreach_lerp_(self.average, [parameter.detach() for parameter in self.parameters], 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the average stands in for the weights."""
        if not self.decay:
            yield
            return
        kept = [parameter.detach().clone() for parameter in self.parameters]
        self._put(self.average)
        try:
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, values: Sequence[torch.Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)
