"""Rates of linear layers on a CPU, by torch's own way and by oneDNN: GFLOP/s, one thread, the fastest of 30 calls.

    python benchmarks/linear_layers.py

The shapes are (rows, in, out) of layers of the embedded models at some dozen samples in a pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import torch
from torch.nn import functional

from diffusion_gym.agents.benchmark.machine import hardware
from diffusion_gym.agents.report.marked import markdown_table
from diffusion_gym.models.linear import onednn_linear

SHAPES: Final = ((4096, 64, 64), (4096, 64, 512), (2048, 128, 128), (1024, 128, 1024), (512, 256, 256))
_CALLS: Final = 30


@torch.no_grad()
def rates(rows: int, inner: int, outer: int) -> list[str]:
    """A line of the table: forward, gradient of the input, gradient of the weights, each by torch and by oneDNN."""
    x, weight, out = torch.randn(rows, inner), torch.randn(outer, inner), torch.randn(rows, outer)
    smaller_first = (x.T, out.T) if inner < outer else (out.T, x.T)  # as the layers have it: the first one is copied
    products = ((x, weight), (out, weight.T), smaller_first)
    told = []
    for one, other in products:
        for product in (functional.linear, onednn_linear):
            seconds = _fastest(lambda product=product, one=one, other=other: product(one, other))  # type: ignore[misc]
            told.append(f"{2 * rows * inner * outer / seconds / 1e9:.0f}")
    return [f"{rows} x {inner} -> {outer}", *told]


def _fastest(work: Callable[[], object]) -> float:
    found = []
    for _ in range(_CALLS):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return min(found)


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    head = ["layer"]
    head += [
        f"{part}, {by}" for part in ("forward", "input's gradient", "weights' gradient") for by in ("torch", "oneDNN")
    ]
    print(markdown_table(head, (rates(*shape) for shape in SHAPES)))
    print(f"\n{hardware()['processor']}, GFLOP/s, one thread, torch {torch.__version__}")


if __name__ == "__main__":
    main()
