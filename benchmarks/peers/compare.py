"""diffusion_gym beside the bare work and beside TRL: a process each, which take turns, iteration by iteration.

    python benchmarks/peers/compare.py run [--trl TRL/bin/python]     # prints the tables; a record for each program
    python benchmarks/peers/compare.py page                           # docs/speed.md from the records

`trl_ddpo.py` says how to make TRL's virtual environment; without one its rows are left out. All programs are loaded
before the first round; in a round each runs one iteration, in an order that turns every time, while the others wait. So
a slow minute of the machine falls on all of them, and ratios within a round are free of it.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import tyro
from page_options import PageOptions
from summary import Record, headline, summary

from diffusion_gym.agents.benchmark.machine import hardware
from diffusion_gym.agents.report.marked import write_marked
from diffusion_gym.storage import read_json, write_json

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parents[1]
RECORDS: Final = ROOT / "docs" / "results" / "speed"
PAGE: Final = PageOptions(RECORDS, ROOT / "docs" / "speed.md")

PROGRAMS: Final = {
    "floor": ("floor.py",),
    "diffusion_gym": ("native.py",),
    "diffusion_gym, larger batches": ("native.py", "--micro-batch", "8"),
    "diffusion_gym, at its best": ("native.py", "--micro-batch", "16"),
    "TRL": ("trl_ddpo.py",),
    "TRL, its default batches": ("trl_ddpo.py", "--sample-batch", "1", "--train-batch", "1", "--accumulation", "8"),
    "TRL, its largest batches": ("trl_ddpo.py", "--train-batch", "8", "--accumulation", "1"),
}


@dataclass(frozen=True)
class RunOptions:
    """Measure, and print the tables."""

    pipeline: Path | None = None
    """A Stable Diffusion directory; by default a small one of random weights is written to build/."""
    trl: Path | None = None
    """Python of TRL's virtual environment."""
    trainables: tuple[Literal["full", "lora"], ...] = ("full", "lora")
    """What trains."""
    rounds: int = 5
    """Measured rounds."""
    samples: int = 16
    """Pictures of an iteration, a multiple of 8."""
    steps: int = 20
    """Denoising steps T."""
    warmup: int = 1
    """Rounds before the measured ones."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """What the UNet computes in."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device."""
    threads: int = 1
    """CPU threads."""
    records: Path = RECORDS
    """Where the records go."""


def run(options: RunOptions) -> None:
    """Measure every program, and print the tables.

    Raises:
        SystemExit: a program failed.
    """
    pipeline = (options.pipeline or small_pipeline()).resolve()
    names = [name for name in PROGRAMS if options.trl or not name.startswith("TRL")]
    records = []
    for trainable in options.trainables:
        print(f"{trainable}: {options.warmup} + {options.rounds} rounds of {', '.join(names)}", flush=True)
        commands = {name: _command(options, name, pipeline, trainable) for name in names}
        for name, line in take_turns(commands, options.warmup + options.rounds).items():
            record = {"name": name, "trainable": trainable, **hardware(), **line}
            slug = name.replace(",", "").replace(" ", "-")
            write_json(options.records / f"{options.device}-{trainable}-{slug}.json", record)
            records.append(record)
    print(f"\n{summary(records)}")


def take_turns(commands: Mapping[str, Sequence[str]], rounds: int) -> dict[str, dict[str, Any]]:
    """The JSON lines of programs that ran one iteration each in turn.

    Raises:
        SystemExit: a program failed; the others are ended.
    """
    with ExitStack() as stack:
        programs = {name: stack.enter_context(Program(command)) for name, command in commands.items()}
        lines = {name: program.answer() for name, program in programs.items()}
        for turn in range(rounds):
            for name in list(programs)[:: 1 if turn % 2 == 0 else -1]:
                lines[name] = programs[name].turn()
        return {name: json.loads(line) for name, line in lines.items()}


class Program:
    """A process that waits for its turns; see `Workload.turns`."""

    def __init__(self, command: Sequence[str]) -> None:
        self.command, self._errors = command, tempfile.TemporaryFile("w+")
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._errors, text=True)

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def turn(self) -> str:
        """Let it run one iteration; its next answer."""
        assert self._process.stdin
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> str:
        """`ready`, or the JSON line of its end; waits for it."""
        assert self._process.stdout
        for line in self._process.stdout:
            if line == "ready\n" or line.startswith("{"):
                return line
        self._errors.seek(0)
        code = self._process.wait()
        raise SystemExit(f"error: {shlex.join(self.command)} ended with {code}:\n{self._errors.read()[-2000:]}")


def small_pipeline() -> Path:
    """A pipeline of random weights in build/, of Stable Diffusion's architecture; it is written once."""
    from diffusion_gym.testing.random_pipeline import write_pipeline

    folder = ROOT / "build" / "bench" / "small"
    if not (folder / "model_index.json").exists():
        import torch

        write_pipeline(folder, "small", 0, torch.float32)
    return folder


def _command(options: RunOptions, name: str, pipeline: Path, trainable: str) -> list[str]:
    script, *own = PROGRAMS[name]
    python = str(options.trl) if name.startswith("TRL") else sys.executable
    shared = ("samples", "steps", "warmup", "precision", "device", "threads")
    flags = [part for key in shared for part in (f"--{key}", str(getattr(options, key)))]
    flags += ["--epochs", str(options.rounds), "--turns", *own, *(["--lora"] if trainable == "lora" else [])]
    return [python, str(HERE / script), str(pipeline), *flags]


def page(options: PageOptions = PAGE) -> None:
    """Write what stands between the page's markers, from the records alone."""
    records: list[Record] = [read_json(path) for path in sorted(options.records.glob("*.json"))]
    made = {"speed": summary, "speed headline": headline}
    write_marked(
        options.page, {name: write(records) if records else "Not measured yet." for name, write in made.items()}
    )


def main() -> None:
    """Run a command."""
    commands = {"run": run, "page": page}
    tyro.extras.subcommand_cli_from_dict(commands, config=(tyro.conf.OmitArgPrefixes,))


if __name__ == "__main__":
    main()
