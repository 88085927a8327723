"""An iteration of DDPO_IS beside an earlier build's: the same work, in turns, iteration by iteration.

    git worktree add ../earlier 4aa767d
    python benchmarks/peers/earlier.py run --earlier ../earlier    # docs/results/earlier/, some minutes on one thread
    python benchmarks/peers/earlier.py page                        # the table of docs/speed.md from there

Each build runs its own `native.py`. A third program is this build with `DIFFUSION_GYM_LINEAR=torch`.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import tyro
from checkout import importable
from compare import HERE, ROOT, small_pipeline, take_turns
from page_options import PageOptions

from diffusion_gym.agents.benchmark.machine import hardware
from diffusion_gym.agents.report.marked import markdown_table, write_marked
from diffusion_gym.models.linear import SWITCH
from diffusion_gym.storage import read_json, write_json

RECORDS: Final = ROOT / "docs" / "results" / "earlier"
PAGE: Final = PageOptions(RECORDS, ROOT / "docs" / "speed.md")
PIPELINES: Final = {"Shapes": lambda: ROOT / "diffusion_gym" / "models" / "shapes" / "weights", "small": small_pipeline}
MICRO_BATCHES: Final = {"Shapes": 64, "small": 16}  # what `train` chooses on a CPU
PARTS: Final = {"rollout": ("rollout_cpu_s",), "training": ("train_cpu_s",), "both": ("rollout_cpu_s", "train_cpu_s")}


@dataclass(frozen=True)
class RunOptions:
    """Measure, and write a record of each pipeline and way to train."""

    earlier: Path
    """A checkout of the earlier build."""
    pipelines: tuple[Literal["Shapes", "small"], ...] = ("Shapes", "small")
    """Which."""
    trainables: tuple[Literal["full", "lora"], ...] = ("full", "lora")
    """What trains."""
    rounds: int = 6
    """Measured rounds; one more warms up."""
    samples: int = 32
    """Pictures of an iteration, a multiple of 8."""
    steps: int = 10
    """Denoising steps T."""
    records: Path = RECORDS
    """Where the records go."""


def run(options: RunOptions) -> None:
    """Measure, and print the rows."""
    with tempfile.TemporaryDirectory() as scratch:
        sources = {name: importable(path, Path(scratch) / name) for name, path in _checkouts(options).items()}
        for name in options.pipelines:
            for trainable in options.trainables:
                flags = ["--samples", options.samples, "--steps", options.steps, "--epochs", options.rounds]
                flags += ["--micro-batch", MICRO_BATCHES[name], "--warmup", 1, "--threads", 1, "--turns"]
                line = [str(PIPELINES[name]()), *map(str, flags), *(["--lora"] if trainable == "lora" else [])]
                commands = {
                    "earlier": _command(sources["earlier"], options.earlier / "benchmarks" / "peers", "torch", line),
                    "now": _command(sources["now"], HERE, "auto", line),
                    "now, by torch alone": _command(sources["now"], HERE, "torch", line),
                }
                found = {
                    each: answer["iterations"] for each, answer in take_turns(commands, options.rounds + 1).items()
                }
                about = {"pipeline": name, "trainable": trainable, "samples": options.samples, "steps": options.steps}
                record = {**about, "iterations": found, **hardware()}
                write_json(options.records / f"{name}-{trainable}.json", record)
                print(" | ".join(row(record)), flush=True)


def _checkouts(options: RunOptions) -> dict[str, Path]:
    return {"earlier": options.earlier, "now": ROOT}


def _command(source: Path, folder: Path, linear: str, line: list[str]) -> list[str]:
    return ["env", f"PYTHONPATH={source}", f"{SWITCH}={linear}", sys.executable, str(folder / "native.py"), *line]


def row(record: dict[str, Any]) -> list[str]:
    """A line of the table: CPU seconds over the earlier build's."""
    turns = record["iterations"]

    def ratio(program: str, part: str) -> str:
        values = [
            sum(ours[key] for key in PARTS[part]) / sum(theirs[key] for key in PARTS[part])
            for ours, theirs in zip(turns[program], turns["earlier"], strict=True)
        ]
        return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    trained = {"full": "all weights", "lora": "LoRA"}[record["trainable"]]
    return [record["pipeline"], trained, *(ratio("now", part) for part in PARTS), ratio("now, by torch alone", "both")]


def page(options: PageOptions = PAGE) -> None:
    """Write what stands between the page's markers, from the records alone."""
    records = [read_json(path) for path in sorted(options.records.glob("*.json"))]
    head = ["pipeline", "trains", "rollout", "training", "both", "both, by torch's linear layers"]
    text = "Not measured yet."
    if records:
        one = records[0]
        text = (
            f"{markdown_table(head, map(row, records))}\n\n{one['samples']} pictures, T = {one['steps']}, guidance 5, "
            f"float32, {one['processor']}, one thread, {len(one['iterations']['now'])} rounds."
        )
    write_marked(options.page, {"earlier": text})


def main() -> None:
    """Run a command."""
    commands = {"run": run, "page": page}
    tyro.extras.subcommand_cli_from_dict(commands, config=(tyro.conf.OmitArgPrefixes,))


if __name__ == "__main__":
    main()
