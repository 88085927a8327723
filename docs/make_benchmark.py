"""The reference results of `shapes-v1`, and the tables that are made of them in README.md and docs/benchmark.md.

    diffusion-gym bench --suite shapes-v1 --seeds 5 --jobs 2 --out runs/shapes-v1   # goes on where it was stopped
    python docs/make_benchmark.py runs/shapes-v1     # take its records and figures over, and write the tables
    python docs/make_benchmark.py                    # only write the tables again

The records are kept in `docs/results/shapes-v1/`, a benchmark's folder without its runs: `diffusion-gym report` makes a
page of it. A test checks that the tables agree with them.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from diffusion_gym.agents.benchmark.results import Results
from diffusion_gym.agents.benchmark.summary import summary_json, summary_text
from diffusion_gym.agents.report.benchmark.page import write_benchmark_report
from diffusion_gym.agents.report.marked import markdown_table, write_marked
from diffusion_gym.storage import read_json, write_json, write_text

ROOT: Final = Path(__file__).resolve().parent.parent
KEPT: Final = ROOT / "docs" / "results" / "shapes-v1"
PAGES: Final = {"README.md": ("scores",), "docs/benchmark.md": ("scores", "verdicts", "costs")}
_FIGURES: Final = (
    "scores.svg",
    "profiles.svg",
    "reward-reward-queries--*.svg",
    "frontier--*.svg",
    "generalisation--*.svg",
)


def take_over(folder: Path) -> None:
    """Copy a benchmark's suite and records, its charts, and the pictures of its best agent."""
    shutil.rmtree(KEPT, ignore_errors=True)
    for path in sorted((folder / "records").glob("*.json")):
        write_json(KEPT / "records" / path.name, read_json(path))
    suite = next(folder.glob("*.toml"))
    write_text(KEPT / suite.name, suite.read_text(encoding="utf-8"))
    write_benchmark_report(folder)
    best = Results.read(folder).agents[0]
    (KEPT / "figures").mkdir()
    for pattern in (*_FIGURES, f"before-after--*--{best}.png"):
        for path in sorted((folder / "figures").glob(pattern)):
            shutil.copyfile(path, KEPT / "figures" / path.name)


def blocks(results: Results) -> dict[str, str]:
    """The marked parts of the pages, by name."""
    summary = summary_json(results)
    return {"scores": _scores(results, summary), "verdicts": _verdicts(results), "costs": _costs(results, summary)}


def _scores(results: Results, summary: Mapping[str, Any]) -> str:
    """A row an agent: its score, and the mean reward on each task after training."""
    agents, tasks = summary["agents"], [task for task in results.suite.tasks if _seeds(results, task)]
    rows = [["pretrained", "0", *(_mean(_first(agents, task)["before"]["reward"]) for task in tasks)]]
    for agent, entry in agents.items():
        score = entry["score"]
        interval = "" if score["low"] is None else f" ({score['low']:.2f} to {score['high']:.2f})"
        found = [entry["tasks"].get(task) for task in tasks]
        cells = ["–" if each is None else _mean(each["after"]["reward"]) for each in found]
        rows.append([f"`{agent}`", f"{score['value']:.2f}{interval}", *cells])
    counts = sorted({len(_seeds(results, task)) for task in tasks})
    budget = next(iter(results.records.values()))["settings"]["total_reward_queries"]
    note = (
        f"{' to '.join(map(str, counts))} seeds a task, {budget:,} reward queries a run, {len(results.records)} runs."
    )
    return f"{markdown_table(['agent', 'score', *tasks], rows)}\n\n{note}"


def _verdicts(results: Results) -> str:
    """What `diffusion-gym bench` prints."""
    return f"```text\n{summary_text(results)}\n```"


def _costs(results: Results, summary: Mapping[str, Any]) -> str:
    """A row an agent: means over its runs of what the reward costs."""
    head = ["agent", "success", "success, held-out", "KL, nats", "Vendi score", "network evaluations", "GB"]
    rows = []
    for agent in summary["agents"]:
        runs = [record for (name, _, _), record in results.records.items() if name == agent]
        first, last = ([record["points"][place] for record in runs] for place in (0, -1))
        changes = [_change(first, last, key) for key in ("success", "held_out_success")]
        kl = np.mean([point["kl"] for point in last])
        vendi = [np.mean([point["vendi"] for point in points]) for points in (first, last)]
        evaluations = np.mean([point["network_evaluations"] for point in last])
        memory = max(record["peak_memory_mb"] for record in runs) / 1000
        cells = [*changes, f"{kl:,.0f}", f"{vendi[0]:.1f} → {vendi[1]:.1f}", f"{evaluations:,.0f}", f"{memory:.1f}"]
        rows.append([f"`{agent}`", *cells])
    minutes = [record["total_seconds"] / 60 for record in results.records.values()]
    note = (
        f"A run took {np.median(minutes):.1f} minutes in the median, all {len(minutes)} together "
        f"{sum(minutes) / 60:.1f} hours, with start and measurements."
    )
    return f"{markdown_table(head, rows)}\n\n{note}"


def _change(first: list[Any], last: list[Any], key: str) -> str:
    """The mean change of a measure over the runs that have it."""
    changes = [after[key] - before[key] for before, after in zip(first, last, strict=True) if key in after]
    return f"{np.mean(changes):+.2f}" if changes else "–"


def _seeds(results: Results, task: str) -> set[int]:
    return {seed for _, of, seed in results.records if of == task}


def _first(agents: Mapping[str, Any], task: str) -> Any:
    return next(entry["tasks"][task] for entry in agents.values() if task in entry["tasks"])


def _mean(found: Mapping[str, float | None]) -> str:
    error = found["standard_error"]
    return f"{found['mean']:.2f}" + ("" if error is None else f" ± {error:.2f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        take_over(Path(sys.argv[1]))
    parts = blocks(Results.read(KEPT))
    for name, names in PAGES.items():
        write_marked(ROOT / name, {part: parts[part] for part in names})
