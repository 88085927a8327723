"""The tables of suites' reference results, in the README and the pages.

    diffusion-gym bench --suite shapes-v1 --seeds 5 --jobs 2 --out runs/shapes-v1   # goes on where it was stopped
    python -m tools.pages.benchmark runs/shapes-v1                                  # take its records and figures over
    python -m tools.pages                                                           # write the tables

The records are kept in `docs/results/SUITE/`, a benchmark's folder without its runs, of which `diffusion-gym report`
makes a page.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from diffusion_gym.agents.benchmark.results import Results
from diffusion_gym.agents.benchmark.summary import beaten, summary_json, summary_text
from diffusion_gym.agents.report.benchmark.page import write_benchmark_report
from diffusion_gym.agents.report.marked import markdown_table
from diffusion_gym.storage import number_or_nan, read_json, write_json, write_text

ROOT: Final = Path(__file__).resolve().parents[2]
KEPT: Final = ROOT / "docs" / "results"
# The marked parts that each page has of each suite; a part's name begins with its suite.
PAGES: Final = {
    "README.md": ("shapes-v1 scores",),
    "docs/leaderboard.md": tuple(
        f"{suite} {part}"
        for suite in ("shapes-v1", "shapes-v2", "shapes-v2-flow", "shapes-v2-general", "libraries")
        for part in ("scores", "costs")
    ),
    "docs/bring-your-own.md": ("libraries costs",),
    "docs/benchmark.md": ("shapes-v1 scores", "shapes-v1 verdicts", "shapes-v1 costs", "shapes-v1 hours"),
    "docs/agents.md": ("shapes-v1 scores", "shapes-v1 costs"),
    "docs/newest-algorithms.md": (
        *(
            f"{suite} {part}"
            for suite in ("shapes-v2", "shapes-v2-flow", "shapes-v2-general")
            for part in ("equal", "scores", "costs", "reached grpo", "hours")
        ),
        "shapes-v2 reached ddpo_is",
    ),
    "docs/libraries.md": ("libraries scores", "libraries verdicts", "libraries costs"),
}
SUITES: Final = tuple(dict.fromkeys(name.split()[0] for names in PAGES.values() for name in names))
# Whose final reward the others are timed to: the seeds' algorithm, and Flow-GRPO, which the newest papers compare with.
BASELINES: Final = ("ddpo_is", "grpo")
_FIGURES: Final = (
    "scores.svg",
    "profiles.svg",
    "reward-reward-queries--*.svg",
    "reward-network-evaluations--*.svg",
    "frontier--*.svg",
    "generalisation--*.svg",
)


def take_over(folder: Path) -> None:
    """Copy a benchmark's suite and records, its charts, and the pictures of its best agent.

    Raises:
        ValueError: no page has a table of the suite.
    """
    results = Results.read(folder)
    if results.suite.name not in SUITES:
        raise ValueError(f"{folder} is of suite {results.suite.name!r}; pages are made of {', '.join(SUITES)}")
    kept = KEPT / results.suite.name
    shutil.rmtree(kept, ignore_errors=True)
    for path in sorted((folder / "records").glob("*.json")):
        write_json(kept / "records" / path.name, read_json(path))
    suite = next(folder.glob("*.toml"))
    write_text(kept / suite.name, suite.read_text(encoding="utf-8"))
    write_benchmark_report(folder)
    (kept / "figures").mkdir()
    for pattern in (*_FIGURES, f"before-after--*--{results.agents[0]}.png"):
        for path in sorted((folder / "figures").glob(pattern)):
            shutil.copyfile(path, kept / "figures" / path.name)


def parts() -> dict[str, str]:
    """The marked parts of the pages, by name."""
    every = {suite: blocks(Results.read(KEPT / suite)) for suite in SUITES}
    return {f"{suite} {name}": text for suite, found in every.items() for name, text in found.items()}


def blocks(results: Results) -> dict[str, str]:
    """The tables of a suite, by name."""
    summary = summary_json(results)
    return {
        "scores": _scores(results, summary),
        "verdicts": _verdicts(results),
        "equal": _equal(results, summary),
        "costs": _costs(results, summary),
        **{f"reached {baseline}": _reached(results, baseline) for baseline in BASELINES},
        "hours": _hours(results),
    }


def _scores(results: Results, summary: Mapping[str, Any]) -> str:
    """A row an agent: its score, and the mean that each task is judged on after training."""
    agents, tasks = summary["agents"], [task for task in results.suite.tasks if _seeds(results, task)]
    judged = {task: results.suite.tasks[task].judged_on for task in tasks}
    rows = [["pretrained", "0", *(_mean(_first(agents, task)["before"][judged[task]]) for task in tasks)]]
    for agent, entry in agents.items():
        found = {task: entry["tasks"].get(task) for task in tasks}
        cells = ["–" if each is None else _mean(each["after"][judged[task]]) for task, each in found.items()]
        rows.append([f"`{agent}`", _score(summary, agent), *cells])
    counts = sorted({len(_seeds(results, task)) for task in tasks})
    budget = next(iter(results.records.values()))["settings"]["total_reward_queries"]
    seeds = f"{' to '.join(map(str, counts))} seed{'' if counts == [1] else 's'}"
    note = f"{seeds} a task, {budget:,} reward queries a run, {len(results.records)} runs."
    heads = [f"{task}, held-out" if results.suite.tasks[task].on_held_out else task for task in tasks]
    return f"{markdown_table(['agent', 'score', *heads], rows)}\n\n{note}"


def _verdicts(results: Results) -> str:
    """What `diffusion-gym bench` prints."""
    return f"```text\n{summary_text(results)}\n```"


def _equal(results: Results, summary: Mapping[str, Any]) -> str:
    """A row an agent: scores, and whom it is better than, at equal reward queries and at equal network evaluations."""
    if not all(record["points"][-1].get("network_evaluations") for record in results.records.values()):
        return ""
    compared = [(each, beaten(each)) for each in (summary, summary_json(results.at_equal("network_evaluations")))]
    head = ["agent", "score, equal queries", "better than", "score, equal evaluations", "better than"]
    rows = []
    for agent in summary["agents"]:
        row = [f"`{agent}`"]
        for each, worse in compared:
            row += [_score(each, agent), ", ".join(f"`{name}`" for name in worse[agent]) or "–"]
        rows.append(row)
    return markdown_table(head, rows)


def _score(summary: Mapping[str, Any], agent: str) -> str:
    score = summary["agents"][agent]["score"]
    return f"{score['value']:.2f}" + ("" if score["low"] is None else f" ({score['low']:.2f} to {score['high']:.2f})")


def _costs(results: Results, summary: Mapping[str, Any]) -> str:
    """A row an agent: means over its runs of what the reward costs, as far as the records have it."""
    rows = []
    for agent in summary["agents"]:
        runs = [record for (name, _, _), record in results.records.items() if name == agent]
        first, last = ([record["points"][place] for record in runs] for place in (0, -1))
        vendi = [_mean_of(points, "vendi", ",.1f") for points in (first, last)]
        row = {
            "success": _change(first, last, "success"),
            "success, held-out": _change(first, last, "held_out_success"),
            "KL, nats": _mean_of(last, "kl", ",.0f"),
            "Vendi score": " → ".join(vendi) if all(vendi) else "",
            "network evaluations": _mean_of(last, "network_evaluations", ",.0f"),
            "CPU seconds": _mean_of(last, "cpu_seconds", ",.0f"),
            "GB": f"{max(record['peak_memory_mb'] for record in runs) / 1000:.1f}",
        }
        rows.append({"agent": f"`{agent}`", **row})
    head = [name for name in rows[0] if any(row[name] for row in rows)]
    return markdown_table(head, [[row[name] or "–" for name in head] for row in rows])


def _reached(results: Results, baseline: str) -> str:
    """A row an agent: in which part of a baseline's CPU seconds it reaches the reward that the baseline ends at."""
    if not all(record["points"][-1].get("cpu_seconds") for record in results.records.values()):
        return ""
    tasks = [task for task in results.suite.tasks if results.seeds(baseline, task)]
    rows = []
    for agent in results.agents:
        shares = [_share(results, agent, baseline, task) for task in tasks]
        found = [share for share in shares if share is not None]
        if agent != baseline and found:
            cells = ["–" if share is None else _portion(share) for share in shares]
            rows.append([f"`{agent}`", *cells, _portion(float(np.median(found)))])
    return markdown_table(["agent", *tasks, "median"], rows) if rows else ""


def _portion(share: float) -> str:
    return f"{share:.2f}" if np.isfinite(share) else "not"


def _share(results: Results, agent: str, baseline: str, task: str) -> float | None:
    """CPU seconds until a task's measure is that of the baseline's end, over the baseline's, or infinite.

    Over the seeds that both have; None where there is none, or where the baseline gains nothing. Between two
    measurements the reward is taken to change linearly with the seconds.
    """
    seeds = sorted({*results.seeds(agent, task)} & {*results.seeds(baseline, task)})
    if not seeds:
        return None
    measures = (results.suite.tasks[task].judged_on, "cpu_seconds")
    rewards, seconds = (_means(results, agent, task, seeds, measure) for measure in measures)
    target, whole = (_means(results, baseline, task, seeds, measure)[-1] for measure in measures)
    if rewards[0] >= target:
        return None
    for place in range(1, len(rewards)):
        if rewards[place] >= target:
            part = (target - rewards[place - 1]) / (rewards[place] - rewards[place - 1])
            return float((seconds[place - 1] + part * (seconds[place] - seconds[place - 1])) / whole)
    return float("inf")


def _means(results: Results, agent: str, task: str, seeds: list[int], measure: str) -> list[float]:
    """A measure at each point, the mean over seeds."""
    runs = [results.records[agent, task, seed]["points"] for seed in seeds]
    return [float(np.mean([number_or_nan(point[measure]) for point in points])) for points in zip(*runs, strict=True)]


def _hours(results: Results) -> str:
    minutes = [record["total_seconds"] / 60 for record in results.records.values()]
    return (
        f"A run took {np.median(minutes):.1f} minutes in the median, all {len(minutes)} together "
        f"{sum(minutes) / 60:.1f} hours, with start and measurements."
    )


def _mean_of(points: list[Any], key: str, form: str) -> str:
    """The mean of a measure over the runs that have it; empty where none has."""
    found = [point[key] for point in points if point.get(key) is not None]
    return format(np.mean(found), form) if found else ""


def _change(first: list[Any], last: list[Any], key: str) -> str:
    """The mean change of a measure over the runs that have it."""
    changes = [after[key] - before[key] for before, after in zip(first, last, strict=True) if key in after]
    return f"{np.mean(changes):+.2f}" if changes else ""


def _seeds(results: Results, task: str) -> set[int]:
    return {seed for _, of, seed in results.records if of == task}


def _first(agents: Mapping[str, Any], task: str) -> Any:
    return next(entry["tasks"][task] for entry in agents.values() if task in entry["tasks"])


def _mean(found: Mapping[str, float | None]) -> str:
    error = found["standard_error"]
    return f"{found['mean']:.2f}" + ("" if error is None else f" ± {error:.2f}")


if __name__ == "__main__":
    take_over(Path(sys.argv[1]))
