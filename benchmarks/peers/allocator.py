"""What keeping freed memory does on a CPU (`diffusion_gym.agents.training.allocator`): DDPO_IS with and without it.

    python benchmarks/peers/allocator.py          # prints the table
    python benchmarks/peers/allocator.py --page   # writes it to docs/speed.md

The two take turns as the programs of `compare.py` do; the one without it has an empty GLIBC_TUNABLES in its
environment. Ratios are the median over rounds, taken within a round, with the smallest and the largest.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Final

import tyro
from compare import HERE, ROOT, small_pipeline, take_turns
from summary import ratio

from diffusion_gym.agents.report.marked import markdown_table, write_marked
from diffusion_gym.models.shapes import WEIGHTS

_MEASURES: Final = ("sampling", "training", "total", "memory")


@dataclass(frozen=True)
class Options:
    """Compare iterations of all weights on one thread."""

    rounds: int = 8
    """Measured rounds, after one to warm up."""
    samples: int = 16
    """Pictures of an iteration, a multiple of 8."""
    steps: int = 10
    """Denoising steps T."""
    page: bool = False
    """Write the table to docs/speed.md instead of printing it."""


def commands(options: Options, pipeline: str, micro_batch: int) -> dict[str, list[str]]:
    """The two programs."""
    sizes = {"samples": options.samples, "steps": options.steps, "epochs": options.rounds, "micro-batch": micro_batch}
    flags = [part for name, size in sizes.items() for part in (f"--{name}", str(size))]
    program = [sys.executable, str(HERE / "native.py"), pipeline, *flags, "--turns"]
    return {"kept": program, "given back": ["env", "GLIBC_TUNABLES=", *program]}


def main(options: Options | None = None) -> None:
    """Measure, and print or write the table."""
    options = options or tyro.cli(Options)
    pipelines = {"`Shapes`": (str(WEIGHTS), 64), "`small`": (str(small_pipeline()), 16)}  # 4,096 positions in a pass
    rows = []
    for name, (pipeline, micro_batch) in pipelines.items():
        records = take_turns(commands(options, pipeline, micro_batch), 1 + options.rounds)
        found = [ratio(records["kept"], records["given back"], measure) for measure in _MEASURES]
        cells = [f"{middle:.2f} ({least:.2f} to {most:.2f})" for middle, least, most in found]
        rows.append([name, str(micro_batch), *cells])
    text = markdown_table(["pipeline", "transitions in one pass", *_MEASURES[:-1], "peak memory"], rows)
    if options.page:
        write_marked(ROOT / "docs" / "speed.md", {"allocator": text})
    else:
        print(text)


if __name__ == "__main__":
    main()
