"""Agents against each other: scores, who is better than whom, performance profiles, baseline against tuned."""

from __future__ import annotations

import re
from typing import Any, Final

import numpy as np

from diffusion_gym.agents.benchmark.statistics import performance_profile
from diffusion_gym.agents.benchmark.summary import beaten
from diffusion_gym.agents.report.benchmark.data import Benchmark
from diffusion_gym.agents.report.benchmark.figures import Figure, Figures
from diffusion_gym.agents.report.charts import Curve, Interval, interval_chart, line_chart, share_chart
from diffusion_gym.storage import number_or_nan

_THRESHOLDS: Final = 31
_CLASS: Final = re.compile(r"p\((.+)\)")
_MEASURES: Final = (  # of the table (thesis, table 5.1); the page has their titles
    "reward",
    "success",
    "held_out_reward",
    "held_out_success",
    "kl",
    "vendi",
    "distance",
    "all_vendi",
    "probe",
)


def better(benchmark: Benchmark) -> dict[tuple[str, ...], list[str]]:
    """For agents that others are better than, which ones are; the best ones first."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for agent, others in beaten(benchmark.summary).items():
        if others:
            groups.setdefault(tuple(others), []).append(agent)
    return groups


def scores(benchmark: Benchmark, figures: Figures) -> list[Figure]:
    """Interquartile means and performance profiles."""
    rows, drawn = [], []
    for agent, entry in benchmark.summary["agents"].items():
        rows.append({"agent": agent, **entry["score"], "runs": entry["runs"], "failed": entry["failed"]})
        name = f"{agent}, {entry['runs']} run" + ("" if entry["runs"] == 1 else "s")
        name += f", {entry['failed']} failed" if entry["failed"] else ""
        value, low, high = (number_or_nan(entry["score"][key]) for key in ("value", "low", "high"))
        drawn.append(Interval(name, value, low, high, benchmark.style(agent)["ink"]))
    label = "interquartile mean over tasks and seeds, 95 % bootstrap interval"
    return [figures.chart("scores", interval_chart("Score", label, drawn), rows), _profiles(benchmark, figures)]


def _profiles(benchmark: Benchmark, figures: Figures) -> Figure:
    scored = {agent: benchmark.results.scores(agent) for agent in benchmark.agents}
    every = np.concatenate([part for parts in scored.values() for part in parts])
    thresholds = np.linspace(min(0.0, every.min()), max(1.0, every.max()), _THRESHOLDS)
    curves = []
    for agent, parts in scored.items():
        profile = performance_profile(parts, thresholds)
        band = [(entry.low, entry.high) for entry in profile]
        values = [entry.value for entry in profile]
        style = benchmark.style(agent)
        curves.append(Curve(agent, thresholds.tolist(), values, **style, band=band, smooth=False, dots=False))
    label = "share of runs above it, 95 % bands"
    chart = line_chart("Performance profiles", "score", label, curves, height=300, zero=True, from_zero=False)
    return figures.chart("profiles", chart, [row for curve in curves for row in curve.rows("score", "share")])


def comparisons(benchmark: Benchmark, figures: Figures) -> dict[str, Any]:
    """The files of the verdicts on all pairs; and the matrix of probabilities that a run of one scores above another's.

    An entry of the matrix is the probability, and whether its interval excludes one half.
    """
    matrix: dict[str, dict[str, tuple[float, bool]]] = {agent: {} for agent in benchmark.agents}
    flat, rows = [], []
    for entry in benchmark.summary["comparisons"]:
        comparison, both = entry["probability"], (entry["first"], entry["second"])
        clear = number_or_nan(comparison["low"]) > 0.5 or number_or_nan(comparison["high"]) < 0.5
        for (first, second), value in ((both, comparison["value"]), (both[::-1], 1 - comparison["value"])):
            matrix[first][second] = value, clear
            rows.append({"first": first, "second": second, "probability": value})
        ends = {f"{key}_{end}": entry[key][end] for key in ("difference", "probability") for end in entry[key]}
        flat.append({key: entry[key] for key in ("first", "second", "verdict", "p", "pairs")} | ends)
    files = [figures.data("verdicts", flat), figures.data("improvement", rows)] if flat else []
    return {"improvement": matrix, "files": files}


def results(benchmark: Benchmark, figures: Figures) -> dict[str, Any]:
    """The measures that the table of means and standard errors shows, and its file."""
    present = {name for task in benchmark.tasks for name in benchmark.measures(task)}
    shown, rows = [name for name in _MEASURES if name in present], []
    for task in benchmark.tasks:
        for agent in benchmark.agents_of(task):
            entry = benchmark.summary["agents"][agent]["tasks"][task]
            row: dict[str, Any] = {"task": task, "agent": agent, "seeds": len(entry["seeds"])}
            for key in shown:
                for part, name in (("before", "baseline"), ("after", "tuned")):
                    measured = entry[part].get(key, {})
                    row[f"{key}_{name}"] = measured.get("mean")
                    row[f"{key}_{name}_standard_error"] = measured.get("standard_error")
            rows.append(row)
    return {"measures": shown, "file": figures.data("results", rows)}


def shares(benchmark: Benchmark, figures: Figures) -> list[Figure]:
    """Before and after: probability of each class, share of strict successes; empty where no reward has either."""
    drawn = []
    for task in benchmark.tasks:
        measures = benchmark.measures(task)
        classes = {name: match[1] for name in measures if (match := _CLASS.fullmatch(name))}
        if classes:
            drawn.append(_shares(benchmark, figures, task, "classes", "mean probability of each class", classes))
        if "success" in measures:
            names = {"success": "success", "": "no success"}
            drawn.append(_shares(benchmark, figures, task, "success", "share of pictures", names))
    return drawn


def _shares(
    benchmark: Benchmark, figures: Figures, task: str, name: str, label: str, categories: dict[str, str]
) -> Figure:
    """The categories are measures and their names; that of "", the last one, is what the others leave."""
    agents, named, shares = benchmark.agents_of(task), list(categories.values()), []
    for model, agent, point in [("pretrained model", agents[0], 0), *((agent, agent, -1) for agent in agents)]:
        values = [benchmark.means(agent, task, measure)[point] for measure in categories if measure]
        shares.append((model, [*values, 1 - sum(values)] if "" in categories else values))
    rows = [{"model": model, **dict(zip(named, values, strict=True))} for model, values in shares]
    chart = share_chart(task, label, named, shares, strong_first="" in categories)
    return figures.chart(f"{name}--{task}", chart, rows)
