"""The tables of docs/sample-efficiency.md, from the records in `docs/results/shapes-fast/`.

    python -m tools.pages.sample_efficiency runs/paper-style runs/fast    # take their records over
    python -m tools.pages                                                 # write the tables

The page has the commands that made the runs.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from diffusion_gym.agents.benchmark.results import Record, Results
from diffusion_gym.agents.benchmark.statistics import Estimate, Scores, holm, mean, sign_flip_p
from diffusion_gym.agents.benchmark.suites import Suite, suite_file
from diffusion_gym.agents.report.marked import markdown_table
from diffusion_gym.storage import read_json, write_json, write_text

ROOT: Final = Path(__file__).resolve().parents[2]
KEPT: Final = ROOT / "docs" / "results" / "shapes-fast"
PAGES: Final = {"docs/sample-efficiency.md": ("queries", "comparison", "ablation")}
SUITE: Final = "shapes-fast"
FAST: Final = "fast"
PAPER: Final = "paper-style"


def take_over(folders: list[Path]) -> None:
    """Copy the records of benchmarks of the suite, and the suite.

    Raises:
        ValueError: a folder without records, or a record of a variant that the suite has otherwise.
    """
    suite, records = Suite.load(SUITE), dict[str, Record]()
    for folder in folders:
        found = {path.name: read_json(path) for path in sorted((folder / "records").glob("*.json"))}
        if not found:
            raise ValueError(f"{folder} holds no records; pass the --out of `diffusion-gym bench --suite {SUITE}`")
        for name, record in found.items():
            check_variant(suite, name, record)
        records |= found
    shutil.rmtree(KEPT / "records", ignore_errors=True)
    for name, record in records.items():
        write_json(KEPT / "records" / name, record)
    write_text(KEPT / f"{SUITE}.toml", suite_file(SUITE).read_text(encoding="utf-8"))


def check_variant(suite: Suite, name: str, record: Record) -> None:
    """Refuse the record of a variant whose options are not those that the suite has now.

    Raises:
        ValueError: an option differs.
    """
    settings = {**record["settings"], **record["settings"]["agent_options"]}
    for option, value in suite.agents[record["agent"]].items():
        if settings[option] != value:
            raise ValueError(f"{name} has {option}={settings[option]!r}, the suite {value!r}; run it again")


def parts() -> dict[str, str]:
    """The marked parts of the pages, by name."""
    return blocks(read())


def blocks(results: Results) -> dict[str, str]:
    """The same of any results."""
    return {"queries": _headline(results), "comparison": _comparison(results), "ablation": _ablation(results)}


def _headline(results: Results) -> str:
    """For each task what both ways reach, with which queries and in which time."""
    lines = []
    for task in results.suite.tasks:
        told = []
        for agent, name in ((FAST, f"`{FAST}`"), (PAPER, "DDPO_IS as in its paper")):
            success, seconds, queries = (
                results.column(agent, task, key).mean() for key in ("success", "seconds", "reward_queries")
            )
            told.append(f"{name} {success:.2f} with {queries:,.0f} reward queries in {seconds:.0f} s")
        before = results.column(FAST, task, "success", 0).mean()
        lines.append(f"- {task}, strict success from {before:.2f}: {', '.join(told)}.")
    return "\n".join(lines)


def _comparison(results: Results) -> str:
    """`fast` and the paper's way, task by task: reward before and after, and what it cost."""
    head = ["task", "", "reward queries", "seconds", "network evaluations", "success before", "after"]
    head += ["held-out, before", "after", "KL, nats", "Vendi score, before", "after"]
    rows, notes = [], []
    for task in results.suite.tasks:
        for agent in (PAPER, FAST):
            queries, seconds, evaluations, kl, vendi = (
                results.column(agent, task, name).mean()
                for name in ("reward_queries", "seconds", "network_evaluations", "kl", "vendi")
            )
            held = [results.column(agent, task, "held_out_success", point).mean() for point in (0, -1)]
            before, diverse = (results.column(agent, task, name, 0).mean() for name in ("success", "vendi"))
            after = _with_interval(mean([results.column(agent, task, "success")]))
            cells = [f"{value:,.0f}" for value in (queries, seconds, evaluations)]
            cells += [
                f"{before:.2f}",
                after,
                *(f"{value:.2f}" for value in held),
                f"{kl:,.0f}",
                f"{diverse:.1f}",
                f"{vendi:.1f}",
            ]
            rows.append([task, f"`{agent}`", *cells])
        gap = results.column(FAST, task, "success") - results.column(PAPER, task, "success")
        cost = [results.column(a, task, "seconds").mean() for a in (FAST, PAPER)]
        notes.append(f"{task} {_with_interval(mean([gap]), signed=True)}, in {cost[0] / cost[1]:.2f} of the seconds")
    seeds = len(results.seeds(FAST, next(iter(results.suite.tasks))))
    note = (
        f"Means over {seeds} seeds with 95 % intervals (percentile bootstrap, which so few seeds make too narrow). "
        f"`{FAST}` less `{PAPER}`, seed by seed: {'; '.join(notes)}."
    )
    return f"{markdown_table(head, rows)}\n\n{note}"


def _ablation(results: Results) -> str:
    """Each variant: what it changes, its success, and the paired difference to `fast` over both tasks."""
    variants = [agent for agent in results.agents if agent not in (FAST, PAPER)]
    gaps = {agent: _gaps(results, agent) for agent in variants}
    p = dict(zip(variants, holm([sign_flip_p(gaps[agent]) for agent in variants]), strict=True))
    tasks = list(results.suite.tasks)
    head, rows = ["variant", "changes", *tasks, f"less `{FAST}`", "p", "KL, nats", "Vendi score", "seconds"], []
    for agent in sorted([FAST, *variants], key=lambda agent: -_overall(results, agent, "success")):
        change = {key: value for key, value in results.suite.agents[agent].items() if key != "agent"}
        told = ", ".join(f"`{key} = {_value(value)}`" for key, value in change.items())
        cells = [f"{results.column(agent, task, 'success').mean():.2f}" for task in tasks]
        against = ["", ""] if agent == FAST else [_with_interval(mean(gaps[agent]), signed=True), f"{p[agent]:.2g}"]
        costs = [_overall(results, agent, key) for key in ("kl", "vendi", "seconds")]
        rows.append([f"`{agent}`", told, *cells, *against, f"{costs[0]:,.0f}", f"{costs[1]:.1f}", f"{costs[2]:.0f}"])
    return markdown_table(head, rows)


def _gaps(results: Results, agent: str) -> Scores:
    return [
        results.column(agent, task, "success") - results.column(FAST, task, "success") for task in results.suite.tasks
    ]


def _overall(results: Results, agent: str, measure: str) -> float:
    return float(np.mean([results.column(agent, task, measure).mean() for task in results.suite.tasks]))


def _value(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def _with_interval(found: Estimate, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{found.value:{sign}.2f} ({found.low:{sign}.2f} to {found.high:{sign}.2f})"


def read() -> Results:
    """The kept records, those of seeds that every variant has on both tasks."""
    found = Results.read(KEPT)
    common = set.intersection(*({*found.seeds(*of)} for of in {key[:2] for key in found.records}))
    kept = {key: record for key, record in found.records.items() if key[2] in common}
    return replace(found, records=kept)


if __name__ == "__main__":
    take_over([Path(argument) for argument in sys.argv[1:]])
