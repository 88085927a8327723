"""The processes of one training: who samples what, and the sums and gathers between them.

`accelerate launch` or `torchrun` starts the processes. Each samples its own share of the trajectories; rewards are
gathered, so that every process knows all advantages; gradients are summed once an optimiser step. Nothing on the wire
is pickled: what is not a tensor travels as JSON in a uint8 tensor.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from diffusion_gym.timing import span

T = TypeVar("T")

_BUCKET = 2**24  # numbers in one message: 64 MB, so that the sum needs little memory of its own
_PATIENCE = timedelta(hours=1)  # a process may wait for another's slow reward, or for the main one's pictures
_SHARDED = {"FSDP": "--use_fsdp", "DEEPSPEED": "--use_deepspeed", "MEGATRON_LM": "--use_megatron_lm"}
_WAITING = "waiting for processes"  # the phase in a profile


# What gloo says of a process that is gone; there is no class of its own for it.
_GONE: Final = re.compile(r"gloo.*(closed by peer|reset by peer|broken pipe|refused|socket)", re.IGNORECASE | re.DOTALL)
_AGREED: Final = "agreed"  # attribute of an error that all processes know of
_TOLD_ELSEWHERE: Final = "told_elsewhere"  # attribute of an error that another process of this machine tells
_CLAIM: Final = "diffusion-gym/says-why-it-ends"  # in the store of the launch


class PeerFailed(RuntimeError):
    """Another process of the training failed or is gone."""


def told_elsewhere(error: BaseException) -> bool:
    """Whether another process of this machine says what went wrong, so that this one need not."""
    return bool(getattr(error, _TOLD_ELSEWHERE, False))


@dataclass(frozen=True)
class Processes:
    """One of `count` processes; by default the only one.

    Attributes:
        index: this process, 0 being the one that logs and saves.
        count: how many there are.
        device: where tensors must be to travel; that of the process.
        in_step: whether all run the network at the same time, each having a part of its weights.
    """

    index: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")
    in_step: bool = False

    @classmethod
    def launched(cls) -> Processes:
        """The processes that `accelerate launch` or `torchrun` started; a single one without them.

        They compute on one GPU each, or on the CPU where there is none or `ACCELERATE_USE_CPU` is true.

        Raises:
            ValueError: the launcher was asked for sharded training, or there was none although WORLD_SIZE is set.
        """
        for name, option in _SHARDED.items():
            if _flag(f"ACCELERATE_USE_{name}"):
                raise ValueError(
                    f"{option} is not how this package spreads a network over processes; launch with --multi_gpu, and "
                    "give the agent sharding='fsdp2' (--agent.sharding fsdp2)"
                )
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            _warn_when_alone()
            return cls()
        if "LOCAL_RANK" not in os.environ:
            raise ValueError(
                f"WORLD_SIZE={os.environ['WORLD_SIZE']} announces several processes, but nothing says which one this "
                "is; start them with accelerate launch or torchrun"
            )
        # Functions in this module have the group of the moment for a default. Imported later, by diffusers say, they
        # would keep the group alive beyond `leaving`, and its threads would abort the interpreter on its way out.
        import torch.distributed.nn.functional  # noqa: F401
        from accelerate import PartialState

        cpu = _flag("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
        # Without `cpu`, accelerate would take processes that have no GPU for unrelated ones.
        state = PartialState(cpu=cpu, backend="gloo" if cpu else "nccl", timeout=_PATIENCE)
        return cls(state.process_index, state.num_processes, torch.device("cpu") if cpu else state.device)

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """At the end of this context, the program's last, part from the other processes.

        Of an error in several of them one process of a machine is to tell, see `told_elsewhere`.
        """
        try:
            yield
        except BaseException as error:
            setattr(error, _TOLD_ELSEWHERE, not isinstance(error, SystemExit) and not self._tells(error))
            if self.device.type == "cpu" and dist.is_initialized():  # NCCL could wait for a process that is gone
                dist.destroy_process_group()
            raise
        if dist.is_initialized():
            dist.destroy_process_group()

    def _tells(self, error: BaseException) -> bool:
        """Whether this is the process of its machine that tells of an error: the first one to ask, unless agreed."""
        if self.count == 1:
            return True
        if getattr(error, _AGREED, False):
            return os.environ.get("LOCAL_RANK", "0") == "0"
        machine = os.environ.get("GROUP_RANK", "0")
        try:  # not by a message to the others, who may wait for one of another kind
            return bool(dist.distributed_c10d._get_default_store().add(f"{_CLAIM}/{machine}", 1) == 1)
        except (RuntimeError, ValueError):  # the process that has the store is gone
            return True

    @property
    def main(self) -> bool:
        """Whether this is the process that logs and saves."""
        return self.index == 0

    def share(self, total: int) -> range:
        """This process's part of `total` items; the parts of all processes in order are the whole.

        Raises:
            ValueError: `total` cannot be shared out evenly.
        """
        if total % self.count:
            raise ValueError(
                f"{total} rollout batches an iteration cannot be shared evenly by {self.count} processes; make "
                f"samples_per_iteration a multiple of rollout_batch times {self.count}, or rollout_batch smaller"
            )
        part = total // self.count
        return range(self.index * part, (self.index + 1) * part)

    def own(self, items: torch.Tensor, mine: torch.Tensor) -> torch.Tensor:
        """The rows of `items` that are this process's, samples counted from its own first one.

        Where it has none and all run the network in step, one row stands in: of its last sample, which `is_own` tells
        from the others, and whose loss counts nothing.

        Args:
            items: int64 `(M, 2)` or more columns, the first of which is the sample.
            mine: which of them, bool `(M,)`.
        """
        kept = items[mine]
        return kept if len(kept) or not self.in_step else stand_in(items)

    def usable(self, values: np.ndarray) -> np.ndarray:
        """Values of samples, with 0 in place of what is not finite where such a sample may stand in for others."""
        return np.where(np.isfinite(values), values, 0.0) if self.in_step else values

    def sum_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over the processes, taken in float32."""
        if self.count > 1:
            with span(_WAITING), peers():
                _exchange(tensors, dist.all_reduce, self.device)

    def copy_main_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by the main process's, so that all begin with the same weights whatever their seeds."""
        if self.count > 1:
            with peers():
                _exchange(tensors, lambda flat: dist.broadcast(flat, 0), self.device)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all processes, joined along the first dimension in order; all have one shape."""
        if self.count == 1:
            return tensor
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.count)]
        with span(_WAITING), peers():
            dist.all_gather(parts, tensor)
        return torch.cat(parts)

    def gather_json(self, value: Any) -> list[Any]:
        """A JSON value of each process, in order."""
        if self.count == 1:
            return [value]
        data = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=self.device)
        sizes = self.gather(torch.tensor([len(data)], device=self.device)).tolist()
        padded = torch.zeros(max(sizes), dtype=torch.uint8, device=self.device)
        padded[: len(data)] = data
        rows = self.gather(padded[None]).cpu()
        return [json.loads(bytes(row[:size].tolist())) for row, size in zip(rows, sizes, strict=True)]

    def of_main(self, value: T) -> T:
        """The main process's value, which is one of JSON."""
        known: T = self.gather_json(value)[0]
        return known

    def agree(self, error: BaseException | None) -> None:
        """Raise in every process when one has failed, so that none waits for it.

        Args:
            error: what went wrong in this process, None if nothing.

        Raises:
            BaseException: `error` itself where it occurred.
            PeerFailed: in the other processes.
        """
        failures = self.gather_json(None if error is None else f"{type(error).__name__}: {error}")
        for index, failure in enumerate(failures):
            if failure is not None:
                known = error or PeerFailed(f"process {index} of {self.count} failed: {failure}")
                setattr(known, _AGREED, True)
                raise known

    def together(self, act: Callable[[], T]) -> T:
        """What `act` gives, in which no process waits for another; where it fails in one, all of them raise.

        Raises:
            BaseException: the error itself where it occurred.
            PeerFailed: in the other processes.
        """
        results: list[T] = []
        failure: BaseException | None = None
        try:
            results.append(act())
        except BaseException as error:  # Ctrl-C too
            failure = error
        self.agree(failure)
        return results[0]


def stand_in(items: torch.Tensor) -> torch.Tensor:
    """A row `(1, ...)` like those of `items`, of a process's last sample; see `Processes.own`."""
    row = items[:1].clone()
    row[:, 0] = -1
    return row


def is_own(items: torch.Tensor) -> torch.Tensor:
    """Which rows of items stand for themselves, bool `(M,)`."""
    return items[:, 0] >= 0


@contextmanager
def peers() -> Iterator[None]:
    """Within this context the other processes are needed.

    Raises:
        PeerFailed: one of them is gone.
    """
    try:
        yield
    except RuntimeError as error:
        if not _GONE.search(str(error)):
            raise
        told = "another process of the training is gone: it was killed, or ended by an error of its own"
        raise PeerFailed(told) from error


@torch.no_grad()
def _exchange(tensors: Sequence[torch.Tensor], send: Callable[[torch.Tensor], Any], device: torch.device) -> None:
    """Let `send` change the tensors, joined as float32 on a device: few messages for many tensors."""
    bucket: list[torch.Tensor] = []
    for position, tensor in enumerate(tensors, 1):
        bucket.append(tensor)
        if position == len(tensors) or sum(part.numel() for part in bucket) >= _BUCKET:
            flat = torch.cat([part.float().flatten() for part in bucket]).to(device)
            send(flat)
            for part, changed in zip(bucket, flat.split([part.numel() for part in bucket]), strict=True):
                part.copy_(changed.view_as(part))
            bucket = []


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def _warn_when_alone() -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process, and says nothing."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
    if launched and "WORLD_SIZE" not in os.environ:
        warnings.warn(
            "accelerate launch has started one process where several were asked for, as it does with --cpu; for "
            "several on the CPU use ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N",
            stacklevel=1,  # one place, so that it is said once
        )
