"""The demo's training beside that of an earlier build, seed by seed and in turns: CPU seconds, and what they buy.

    git worktree add ../earlier 4aa767d
    python benchmarks/demo.py run --earlier ../earlier    # docs/results/demo/, 20 minutes on one thread
    python benchmarks/demo.py page                        # the table of docs/shapes-preset.md from there

A training is a process of its own on one thread; its CPU seconds are all of it, with imports, development set and
checkpoints. This build evaluates both, on 256 pictures of each model from the same noise.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import tyro
from peers.checkout import importable
from peers.page_options import PageOptions

from diffusion_gym.agents.benchmark.machine import hardware
from diffusion_gym.agents.demo import RECIPES
from diffusion_gym.agents.report.marked import markdown_table, write_marked
from diffusion_gym.agents.training.evaluation import EVALUATION_SEED
from diffusion_gym.agents.training.runs import evaluate_run
from diffusion_gym.storage import read_json, write_json

ROOT: Final = Path(__file__).resolve().parent.parent
RECORDS: Final = ROOT / "docs" / "results" / "demo"
PAGE: Final = PageOptions(RECORDS, ROOT / "docs" / "shapes-preset.md")
ENVIRONMENT: Final = "DiffusionDenoise-Shapes-Location-v0"
PROBE: Final = "background_probe:lightness"  # of examples/
BUILDS: Final = ("earlier", "demo")


@dataclass(frozen=True)
class RunOptions:
    """Train with both builds, and write a record of each training; those that are there stay."""

    earlier: Path
    """A checkout of the earlier build."""
    agent: str = "ddpo_is"
    """Its demo's agent."""
    preset: str = "shapes-demo"
    """Its demo's preset."""
    seeds: int = 3
    """How many."""
    samples: int = 256
    """Pictures of each model to evaluate."""
    total_reward_queries: int | None = None
    """Pictures to score in each training; by default the presets'."""
    records: Path = RECORDS
    """Where the records go."""


def run(options: RunOptions) -> None:
    """Measure what is missing."""
    sys.path.insert(0, str(ROOT / "examples"))
    recipes = {"earlier": (options.agent, options.preset), "demo": RECIPES["Shapes"]}
    with tempfile.TemporaryDirectory() as scratch:
        checkouts = zip(BUILDS, (options.earlier, ROOT), strict=True)
        sources = {build: importable(checkout, Path(scratch) / build) for build, checkout in checkouts}
        for seed in range(options.seeds):
            for build in BUILDS:
                path = options.records / f"{build}-seed-{seed}.json"
                if path.exists():
                    continue
                out = Path(scratch) / path.stem
                cpu = _train(sources[build], out, *recipes[build], seed, options.total_reward_queries)
                found = evaluate_run(out, options.samples, EVALUATION_SEED, trust=True, probe=PROBE)
                record = {
                    "build": build,
                    "agent": recipes[build][0],
                    "preset": recipes[build][1],
                    "seed": seed,
                    "cpu_seconds": round(cpu, 1),
                    **{name: found[name] for name in ("reward_queries", "base_success", "success", "success_ci95")},
                    **{name: found[name] for name in ("kl_to_base", "base_vendi", "vendi")},
                    "held_out": {name: found["held_out"][name] for name in ("base_success", "success")},
                    "lightness": [found["probe"][name] for name in ("base_mean", "mean")],
                    **hardware(),
                }
                write_json(path, record)
                print(" | ".join(row(record)), flush=True)


def _train(source: Path, out: Path, agent: str, preset: str, seed: int, queries: int | None) -> float:
    """The CPU seconds of a training."""
    code = "from diffusion_gym.agents.cli import main; main()"
    line = [sys.executable, "-P", "-c", code, "train", "--env", ENVIRONMENT, "--agent", agent, "--preset", preset]
    line += ["--seed", str(seed), "--threads", "1", "--out", str(out)]
    line += [] if queries is None else ["--total-reward-queries", str(queries)]
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    before = _cpu_seconds()
    subprocess.run(line, check=True, env=environment, stdout=subprocess.DEVNULL)
    return _cpu_seconds() - before


def _cpu_seconds() -> float:
    """Those of the processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def row(record: dict[str, Any]) -> list[str]:
    """A line of the table."""
    low, high = record["success_ci95"]
    return [
        f"`{record['agent']}`",
        str(record["seed"]),
        f"{record['reward_queries']:,}",
        f"{record['cpu_seconds']:.0f}",
        f"{record['success']:.2f} ({low:.2f} to {high:.2f})",
        f"{record['held_out']['success']:.2f}",
        f"{record['kl_to_base']:,.0f}",
        f"{record['vendi']:.1f}",
        f"{record['lightness'][1]:.2f}",
    ]


def table(records: list[dict[str, Any]]) -> str:
    """All rows, and the ratio of the CPU seconds; of the seeds that both builds have."""
    head = ["agent", "seed", "reward queries", "CPU seconds", "success", "held-out", "KL, nats", "Vendi score"]
    sides = [{each["seed"]: each for each in records if each["build"] == build} for build in BUILDS]
    seeds = sorted(sides[0].keys() & sides[1].keys())
    if not seeds:
        return "Not measured yet."
    theirs, ours = ([side[seed] for seed in seeds] for side in sides)
    ratios = [now["cpu_seconds"] / then["cpu_seconds"] for then, now in zip(theirs, ours, strict=True)]
    one = ours[0]
    mean = statistics.mean(record["success"] for record in ours)
    held = statistics.mean(record["held_out"]["success"] for record in ours)
    processors = ", ".join(sorted({record["processor"] for record in theirs + ours}))
    return (
        f"{markdown_table([*head, 'lightness'], map(row, theirs + ours))}\n\n"
        f"Before: success {one['base_success']:.2f}, held-out {one['held_out']['base_success']:.2f}, Vendi score "
        f"{one['base_vendi']:.1f}, lightness {one['lightness'][0]:.2f}. The last {len(seeds)} rows are the demo's: "
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) of the first ones' CPU seconds, in "
        f"the mean success {mean:.2f} and held-out {held:.2f}. {processors}, one thread."
    )


def page(options: PageOptions = PAGE) -> None:
    """Write what stands between the page's markers, from the records alone."""
    records = [read_json(path) for path in options.records.glob("*.json")]
    write_marked(options.page, {"demo cost": table(records)})


def main() -> None:
    """Run a command."""
    commands = {"run": run, "page": page}
    tyro.extras.subcommand_cli_from_dict(commands, config=(tyro.conf.OmitArgPrefixes,))


if __name__ == "__main__":
    main()
