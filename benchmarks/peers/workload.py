"""The workload that all programs here run, and what each of them tells of it.

Needs torch, Pillow and tyro alone, because a peer's virtual environment has no diffusion_gym.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, TypeVar

import torch
import tyro

P = ParamSpec("P")
R = TypeVar("R")

_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "trl")
_ANIMALS = ("cat", "dog", "horse", "monkey", "rabbit", "zebra", "spider", "bird", "sheep", "deer", "cow", "goat")


@dataclass(frozen=True)
class Workload:
    """DDPO_IS on a pipeline of random weights with the JPEG reward; the same numbers mean the same work everywhere."""

    pipeline: Annotated[str, tyro.conf.Positional]
    """A Stable Diffusion directory; `python -m diffusion_gym.testing.random_pipeline OUT --size small` makes one."""
    samples: int = 16
    """Pictures of an iteration."""
    sample_batch: int = 8
    """Pictures sampled at once."""
    train_batch: int = 4
    """Samples of a training batch, of which a peer trains one time step at once."""
    accumulation: int = 2
    """Training batches of an update; their product is the trajectories behind it, each with all its time steps."""
    micro_batch: int | None = None
    """Transitions in one forward and backward pass of the floor and of diffusion_gym; by default the training batch.
    0 lets diffusion_gym find it."""
    steps: int = 20
    """Denoising steps T."""
    guidance: float = 5.0
    """Guidance scale, of rollouts and of training."""
    eta: float = 1.0
    """Eta of the sampler."""
    clip: float = 1e-4
    """Clip range."""
    lr: float = 1e-5
    """Learning rate."""
    lora: bool = False
    """Train adapters of rank 4 on the attention layers in place of all weights."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """What the UNet computes in; frozen weights are stored in it."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device."""
    threads: int = 1
    """CPU threads of torch; 0 leaves it the choice."""
    warmup: int = 1
    """Iterations before the measured ones."""
    epochs: int = 2
    """Measured iterations."""
    seed: int = 0
    """Seed."""
    turns: bool = False
    """Say `ready` and wait for a line on standard input before each iteration."""

    def __post_init__(self) -> None:
        for name, size in (("sample_batch", self.sample_batch), ("train_batch * accumulation", self.trajectories)):
            if size < 1 or self.samples % size:
                raise ValueError(f"samples={self.samples} must be a multiple of {name}={size}")

    @property
    def trajectories(self) -> int:
        """Trajectories behind one update."""
        return self.train_batch * self.accumulation

    @property
    def passed_at_once(self) -> int:
        """Transitions in one forward and backward pass; 0 where it is to be found."""
        return self.train_batch if self.micro_batch is None else self.micro_batch

    @property
    def dtype(self) -> torch.dtype:
        """What the UNet computes in."""
        return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]

    def prepare(self) -> None:
        """Set threads and seeds; nothing is looked for on the hub."""
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        if self.threads:
            torch.set_num_threads(self.threads)
        torch.manual_seed(self.seed)
        random.seed(self.seed)


def draw_prompt() -> str:
    """A prompt."""
    return random.choice(_ANIMALS)


def negative_jpeg_kb(images: torch.Tensor) -> list[float]:
    """The reward of pictures `(N, 3, H, W)` in [0, 1]: minus the kB of each as a JPEG of quality 95."""
    from PIL import Image

    rewards = []
    for pixels in images.float().mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy():
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="JPEG", quality=95)
        rewards.append(-buffer.tell() / 1000)
    return rewards


class Meter:
    """Wall and CPU seconds of the phases of iterations, and the memory of the process.

    A phase `x` is reported as `x_s` and `x_cpu_s` of each measured iteration. On a GPU a phase waits for the device at
    both ends.

    Args:
        workload: says how many iterations warm up.
    """

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.iterations: list[dict[str, float]] = []
        self._open: dict[str, tuple[float, float]] = {}
        self._loaded_mb = 0.0

    def next_iteration(self) -> None:
        """What is measured from here on is of a new iteration; waits for this program's turn."""
        if not self.iterations:
            self._loaded_mb = _memory_mb("VmRSS")
        if self._cuda and len(self.iterations) == self.workload.warmup:
            torch.cuda.reset_peak_memory_stats()
        if self.workload.turns:
            print("ready", flush=True)
            sys.stdin.readline()
        self.iterations.append({})

    @property
    def _cuda(self) -> bool:
        return self.workload.device == "cuda"

    def _now(self) -> tuple[float, float]:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def begin(self, phase: str) -> None:
        """Start the clocks of a phase."""
        self._open[phase] = self._now()

    def end(self, phase: str) -> None:
        """Stop them."""
        row = self.iterations[-1]
        for key, then, now in zip((f"{phase}_s", f"{phase}_cpu_s"), self._open.pop(phase), self._now(), strict=True):
            row[key] = row.get(key, 0.0) + now - then

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What runs within this context is the phase."""
        self.begin(name)
        yield
        self.end(name)

    def part(self, name: str, function: Callable[P, R]) -> Callable[P, R]:
        """`function` with its calls measured as a phase within a phase; itself on a GPU, which is not to be stopped."""

        def measured(*args: P.args, **kwargs: P.kwargs) -> R:
            with self.phase(name):
                return function(*args, **kwargs)

        return function if self._cuda else measured

    def line(self, program: str, trained_parameters: int, **extra: Any) -> dict[str, Any]:
        """The program's result, as JSON values; `peak_rss_mb` is of the whole process, imports included."""
        return {
            "program": program,
            "workload": {**asdict(self.workload), "pipeline": Path(self.workload.pipeline).name},
            "iterations": self.iterations[self.workload.warmup :],
            "loaded_rss_mb": self._loaded_mb,
            "peak_rss_mb": _memory_mb("VmHWM"),
            "peak_cuda_mb": torch.cuda.max_memory_allocated() / 2**20 if self._cuda else None,
            "card": torch.cuda.get_device_name() if self._cuda else None,
            "trained_parameters": trained_parameters,
            **extra,
            "versions": _versions(_PACKAGES),
        }


def _memory_mb(field: str) -> float:
    """A field of Linux's /proc/self/status in MB; elsewhere the highest resident memory so far, whatever the field.

    VmHWM, not `ru_maxrss`: that one begins with the memory of the process which started this one.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 2**10


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def main(measure: Callable[[Workload], dict[str, Any]]) -> None:
    """The command line of a program: the workload's options in, one JSON line out."""
    print(json.dumps(measure(tyro.cli(Workload, description=measure.__doc__))))
