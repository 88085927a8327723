"""What a benchmark says in a few lines, and in full as JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

import numpy as np

from diffusion_gym.agents.benchmark.results import Cost, Results, Verdict
from diffusion_gym.agents.benchmark.statistics import Estimate, interquartile_mean
from diffusion_gym.storage import json_text, write_json, write_text

_FORMAT: Final = "diffusion-gym-benchmark-summary-1"
_AT_AN_END: Final = (
    "an interval that ends at its own estimate is of few, tied differences, and too narrow: trust p, or run more seeds"
)
_KEYS: Final = ("agent", "task", "seed")


def summary_text(results: Results, cost: Cost = "reward_queries") -> str:
    """A line an agent, and one for each pair of agents, compared at equal costs."""
    results = results.at_equal(cost)
    width = max(map(len, ("agent", *results.agents)))
    lines = [f"{'agent':{width}}{'score':>8}  {'95 % interval':18}{'runs':>5}{'failed':>8}"]
    for agent in results.agents:
        scores = results.scores(agent)
        mean, runs = interquartile_mean(scores), sum(len(part) for part in scores)
        lines.append(f"{agent:{width}}{mean.value:8.3f}  {_interval(mean):18}{runs:5}{results.failed(agent):8}")
    lines.append("score: interquartile mean over tasks and seeds; 0 is the pretrained model, 1 the task's ceiling")
    if held_out := [name for name, task in results.suite.tasks.items() if task.on_held_out]:
        lines.append(f"on held-out prompts: {', '.join(held_out)}")
    verdicts = results.verdicts()
    if verdicts:
        lines += ["", *map(_sentence, verdicts)]
        lines.append("better, worse: the 95 % interval of the paired differences excludes 0, and Holm's p <= 0.05")
        if any(verdict.difference.at_an_end for verdict in verdicts):
            lines.append(_AT_AN_END)
    return "\n".join(lines)


def summary_json(results: Results) -> dict[str, Any]:
    """All numbers of the tables, as JSON values; what has no value is null."""
    content = {
        "format": _FORMAT,
        "suite": results.suite.name,
        "agents": {agent: _agent(results, agent) for agent in results.agents},
        "comparisons": [{**asdict(verdict), "verdict": verdict.word} for verdict in results.verdicts()],
        "failures": [{key: record[key] for key in (*_KEYS, "error")} for record in results.failures],
    }
    plain: dict[str, Any] = json.loads(json_text(content))
    return plain


def beaten(summary: Mapping[str, Any]) -> dict[str, list[str]]:
    """For each agent of a `summary_json` those that it is better than; the best ones first."""
    found: dict[str, list[str]] = {agent: [] for agent in summary["agents"]}
    for entry in summary["comparisons"]:
        if entry["verdict"] != "undecided":
            pair = entry["first"], entry["second"]
            winner, other = pair if entry["verdict"] == "better" else pair[::-1]
            found[winner].append(other)
    return found


def write_summary(results: Results) -> None:
    """Write `summary.json`, and `points.csv` with a row for each run and measurement, to the benchmark's folder."""
    write_json(results.folder / "summary.json", summary_json(results))
    rows = [
        {**{key: record[key] for key in _KEYS}, **point}
        for record in results.records.values()
        for point in record["points"]
    ]
    text = io.StringIO()
    table = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(results.folder / "points.csv", text.getvalue())


def _agent(results: Results, agent: str) -> dict[str, Any]:
    scores = results.scores(agent)
    return {
        "score": asdict(interquartile_mean(scores)),
        "runs": sum(len(part) for part in scores),
        "failed": results.failed(agent),
        "tasks": {task: _task(results, agent, task) for task in results.tasks_of(agent)},
    }


def _task(results: Results, agent: str, task: str) -> dict[str, Any]:
    """The score on a task; and of each measure, before and after, the mean over seeds and its standard error."""
    seeds = results.seeds(agent, task)
    measures = dict.fromkeys(key for seed in seeds for key in results.records[agent, task, seed]["points"][-1])
    return {
        "seeds": seeds,
        "judged_on": results.suite.tasks[task].judged_on,
        "score": asdict(interquartile_mean(results.scores(agent, tasks=[task]))),
        **{
            name: {measure: _mean(results.column(agent, task, measure, point)) for measure in measures}
            for name, point in (("before", 0), ("after", -1))
        },
    }


def _mean(values: Any) -> dict[str, float]:
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return {"mean": float(values.mean()), "standard_error": float(error)}


def _sentence(verdict: Verdict) -> str:
    word = {"better": "better than", "worse": "worse than", "undecided": "undecided against"}[verdict.word]
    return (
        f"{verdict.first} {word} {verdict.second}: {verdict.difference.value:+.3f} ({_interval(verdict.difference)}), "
        f"probability of improvement {verdict.probability.value:.2f}, p {verdict.p:.2g}, {verdict.pairs} pairs"
    )


def _interval(estimate: Estimate) -> str:
    return f"{estimate.low:.3f} to {estimate.high:.3f}" if math.isfinite(estimate.low) else "one seed: none"
