"""The processes of one training: who samples what, and the sums and gathers between them.

`accelerate launch` starts the processes and gives them their devices. Each samples its own share of the trajectories;
rewards are gathered, so that every process knows all advantages; gradients are summed once an optimiser step. Nothing
on the wire is pickled: what is not a tensor travels as JSON in a uint8 tensor.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

_BUCKET = 2**24  # numbers in one message: 64 MB, so that the sum needs little memory of its own


class PeerFailed(RuntimeError):
    """Another process of the training failed; its own output says why."""


@dataclass(frozen=True)
class Processes:
    """One of `count` processes; by default the only one.

    Attributes:
        index: this process, 0 being the one that logs and saves.
        count: how many there are.
        device: where tensors must be to travel; that of the process.
    """

    index: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")

    @classmethod
    def launched(cls) -> Processes:
        """The processes that `accelerate launch` or `torchrun` started; a single one without them."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        from accelerate import PartialState

        state = PartialState()
        return cls(state.process_index, state.num_processes, state.device)

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

    def sum_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over the processes: few messages for many tensors."""
        if self.count == 1:
            return
        bucket: list[torch.Tensor] = []
        for position, tensor in enumerate(tensors, 1):
            bucket.append(tensor)
            if position == len(tensors) or sum(part.numel() for part in bucket) >= _BUCKET:
                flat = torch.cat([part.detach().float().flatten() for part in bucket])
                dist.all_reduce(flat)
                for part, total in zip(bucket, flat.split([part.numel() for part in bucket]), strict=True):
                    part.copy_(total.view_as(part))
                bucket = []

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all processes, joined along the first dimension in order; all have one shape."""
        if self.count == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.count)]
        dist.all_gather(parts, tensor.contiguous())
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

    def agree(self, error: Exception | None) -> None:
        """Raise in every process when one has failed, so that none waits for it.

        Args:
            error: what went wrong in this process, None if nothing.

        Raises:
            Exception: `error` itself where it occurred.
            PeerFailed: in the other processes.
        """
        failures = self.gather_json(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for index, failure in enumerate(failures):
            if failure is not None:
                raise PeerFailed(f"process {index} of {self.count} failed: {failure}")
