"""From losses to new weights: micro-batches, gradient sums, clipping, AdamW, learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffusion_gym.agents.finite import Options, require, require_choice
from diffusion_gym.agents.optimizer_state import optimizer_tensors, restore_optimizer
from diffusion_gym.agents.processes import Processes, is_own, stand_in
from diffusion_gym.devices import local_part, whole
from diffusion_gym.timing import span

LearningRateSchedule = Literal["constant", "warmup_cosine"]
Adam = Literal["adamw", "adamw8bit"]
Losses = Mapping[str, torch.Tensor]
_Result = TypeVar("_Result")

_LARGEST_TRIED = 512


@dataclass(frozen=True)
class OptimizerOptions(Options):
    """AdamW, its learning-rate schedule, gradient clipping and micro-batches; defaults of the DDPO paper, table F.6."""

    learning_rate: float = 1e-5
    """Learning rate of AdamW; its peak where a schedule moves it."""
    learning_rate_schedule: LearningRateSchedule = "constant"
    """Constant, or a linear warm-up followed by half a cosine (thesis, figure 5.7)."""
    warmup_fraction: float = 0.25
    """Part of the training that warms up, with `warmup_cosine`."""
    first_learning_rate: float = 0.0
    """Where the warm-up begins."""
    last_learning_rate: float = 0.0
    """Where the cosine ends."""
    adam_beta1: float = 0.9
    """First-moment decay of AdamW."""
    adam_beta2: float = 0.999
    """Second-moment decay of AdamW."""
    adam_epsilon: float = 1e-8
    """Epsilon of AdamW."""
    weight_decay: float = 1e-4
    """Weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Largest gradient norm; a longer gradient is scaled down to it."""
    micro_batch_size: int = 0
    """Transitions in one forward and backward pass; changes speed and memory, not the result. 0 finds the largest
    that fits."""
    optimizer: Adam = "adamw"
    """AdamW, or on a GPU `adamw8bit`: its two moments in 8 bits, a quarter of their memory, by bitsandbytes, which is
    to be installed. It pays where all weights train. Native agents only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "larger than 0", "learning_rate", "max_grad_norm", "adam_epsilon")
        require(self, "at least 0", "first_learning_rate", "last_learning_rate", "weight_decay")
        require(self, "at least 0 and less than 1", "adam_beta1", "adam_beta2")
        require_choice(self, "learning_rate_schedule", LearningRateSchedule)
        require_choice(self, "optimizer", Adam)
        if self.micro_batch_size < 0:
            raise ValueError(f"micro_batch_size={self.micro_batch_size!r} must be 0 (automatic) or larger")
        if not 0 < self.warmup_fraction < 1:
            raise ValueError(f"warmup_fraction={self.warmup_fraction!r} must lie between 0 and 1")

    @property
    def adamw(self) -> dict[str, Any]:
        """All but the learning rate, as `torch.optim.AdamW` calls it."""
        betas = (self.adam_beta1, self.adam_beta2)
        return {"betas": betas, "eps": self.adam_epsilon, "weight_decay": self.weight_decay}

    def make(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser of these parameters.

        Raises:
            ValueError: one with moments in 8 bits, without a GPU or without bitsandbytes.
        """
        kind: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
        if self.optimizer == "adamw8bit":
            if parameters[0].device.type != "cuda":
                raise ValueError(
                    f"optimizer='adamw8bit' needs device='cuda', not {parameters[0].device.type!r}; use 'adamw' there"
                )
            kind = eight_bit_adamw()
        return kind(parameters, lr=self.learning_rate, **self.adamw)


def eight_bit_adamw() -> type[torch.optim.Optimizer]:
    """Bitsandbytes' AdamW (arXiv:2110.02861): parameters of less than 4,096 values keep their moments in float32.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            f"optimizer='adamw8bit' needs bitsandbytes ({error}); pip install bitsandbytes, or use optimizer='adamw'"
        ) from error
    kind: type[torch.optim.Optimizer] = AdamW8bit
    return kind


def learning_rate_at(options: OptimizerOptions, fraction_done: float) -> float:
    """The learning rate when `fraction_done`, 0 to 1, of the training is over (thesis, figure 5.7)."""
    if options.learning_rate_schedule == "constant":
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
        loss_scaling: scale losses against underflow, for float16.
        adam: an optimiser of these parameters to use in place of an AdamW; its learning rate stays as it is.

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
        *,
        loss_scaling: bool = False,
        adam: torch.optim.Optimizer | None = None,
    ) -> None:
        self.parameters, self.options = list(parameters.values()), options
        self.processes = processes or Processes()
        self.fraction_done = 0.0
        self._scheduled = adam is None
        self.adam = adam or options.make(self.parameters)
        self.micro_batch_size = options.micro_batch_size or largest_micro_batch
        self._scaler = torch.amp.GradScaler(self.parameters[0].device.type, enabled=loss_scaling)
        self._spread = hasattr(self.parameters[0], "to_local")  # over the processes, each of which has a part

    def step(
        self,
        items: torch.Tensor,
        losses: Callable[[torch.Tensor], Losses],
        count: int,
        unless: Callable[[Losses], bool] = lambda means: False,
    ) -> dict[str, torch.Tensor]:
        """One update that minimises the mean of `losses(items)["loss"]`.

        Args:
            items: this process's items, rows of a tensor; there may be none.
            losses: the losses of a micro-batch of M items, each entry `(M,)`; `loss` is minimised, the others are
                reported.
            count: items of all processes together.
            unless: leaves the weights as they are where it says so of the means.

        Returns:
            The means of all entries over all items, `grad_norm` before clipping, and `learning_rate`; 0-dimensional.
            With loss scaling also `overflow`, 1 where the scaled gradient left the range of float16, so that the
            update was left out and the scale halved; `grad_norm` is 0 then.
        """
        means = self._accumulate(items, losses, count)
        with span("optimiser"):
            return {**means, **self._follow_gradient(take=not unless(means))}

    def _follow_gradient(self, take: bool) -> dict[str, torch.Tensor]:
        """The step on the gradient that was summed up; the entries about it that `AccumulatingOptimizer.step` returns.

        Args:
            take: whether the optimiser takes it.
        """
        about: dict[str, torch.Tensor] = {}
        self._scaler.unscale_(self.adam)
        norm = whole(torch.nn.utils.clip_grad_norm_(self.parameters, self.options.max_grad_norm))
        if self._scaler.is_enabled():
            overflow = ~norm.isfinite()
            about["overflow"], norm = overflow.float(), norm.masked_fill(overflow, 0.0)
        rate = self.adam.param_groups[0]["lr"]
        if self._scheduled:
            rate = learning_rate_at(self.options, self.fraction_done)
            for group in self.adam.param_groups:
                group["lr"] = rate
        if take:
            self._scaler.step(self.adam)
        self._scaler.update()
        return {**about, "grad_norm": norm, "learning_rate": torch.tensor(rate, dtype=torch.float64)}

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
                return torch.cat([values(part) for part in self._parts(items)])[: len(items)]

        none = torch.zeros(0, device=local_part(self.parameters[0]).device)
        return self._fitting(items, passes) if len(items) else none

    def _parts(self, items: torch.Tensor) -> list[torch.Tensor]:
        """The micro-batches of items; equally many in all processes where they run the network in step."""
        parts = list(items.split(self.micro_batch_size)) if len(items) else []
        if self.processes.in_step:
            most = max(self.processes.gather_json(len(parts)))
            parts += [stand_in(items)] * (most - len(parts))
        return parts

    def _fitting(self, items: torch.Tensor, passes: Callable[[], _Result]) -> _Result:
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
        zero = torch.zeros((), device=local_part(self.parameters[0]).device)
        self._scaler.scale(zero)  # makes the loss scale, which no item may need here
        totals: dict[str, torch.Tensor] = {}
        # FSDP takes the mean of the processes' gradients, which are parts of a sum.
        share = count / self.processes.count if self._spread else count
        for part in self._parts(items):
            with span("training forward"):
                rows = self._counted(losses(part), part)
                loss = self._scaler.scale(rows["loss"].sum() / share)
            with span("training backward"):
                loss.backward()
            for key, value in rows.items():
                totals[key] = totals.get(key, 0.0) + value.detach().sum() / count
        return totals

    def _counted(self, rows: Losses, items: torch.Tensor) -> Losses:
        """The losses of items without those that only stand in."""
        if not self.processes.in_step:
            return rows
        own = is_own(items)
        return {key: torch.where(own.to(value.device), value, 0.0) for key, value in rows.items()}

    def _over_processes(self, totals: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if not self._spread:  # else the backward pass has summed them up
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
        """The micro-batch size and the loss scale, as JSON values."""
        return {"micro_batch_size": self.micro_batch_size, "loss_scale": self._scaler.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` gave; a micro-batch that the options fix stays."""
        self.micro_batch_size = self.options.micro_batch_size or state["micro_batch_size"]
        if state["loss_scale"]:
            self._scaler.load_state_dict(dict(state["loss_scale"]))


def recomputed(
    function: Callable[..., tuple[torch.Tensor, ...]], size: int, observation: Mapping[str, torch.Tensor], *rows: Any
) -> tuple[torch.Tensor, ...]:
    """`function(observation, *rows)` of N states, so many at a time that memory is bounded.

    For a library's algorithm, which takes the loss of all states at once: the activations of a part are not stored but
    computed again in the backward pass, at the price of one more forward pass.

    Args:
        function: gives tensors of as many rows as there are states.
        size: states in a part; 0 takes all at once, and keeps their activations.
        observation: of the states, as `DenoisingPolicy.distribution` takes them.
        *rows: further tensors of N rows.
    """
    number = len(observation["latents"])
    if not size or number <= size:
        return function(observation, *rows)
    parts = []
    for start in range(0, number, size):
        part = slice(start, start + size)
        arguments = {name: value[part] for name, value in observation.items()}, *(row[part] for row in rows)
        parts.append(checkpoint(function, *arguments, use_reentrant=False))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _out_of_memory(error: RuntimeError) -> bool:
    from accelerate.utils.memory import should_reduce_batch_size

    return should_reduce_batch_size(error)
