"""All tasks together: scores, who is better than whom, performance profiles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from diffusion_gym.agents.benchmark.statistics import performance_profile
from diffusion_gym.agents.reporting.benchmark.data import Benchmark
from diffusion_gym.agents.reporting.benchmark.files import Figures
from diffusion_gym.agents.reporting.charts import Curve, LineChart
from diffusion_gym.agents.reporting.markup import Html, element, table
from diffusion_gym.agents.reporting.results import number
from diffusion_gym.agents.reporting.rows import Interval, IntervalChart

_THRESHOLDS: Final = 31
_WORDS: Final = {"better": "better than", "worse": "worse than", "undecided": "undecided against"}


def aggregate(benchmark: Benchmark, figures: Figures) -> Html:
    """Interquartile means, verdicts, probabilities of improvement, performance profiles."""
    text = "A run's score is 0 where its reward is the pretrained model's, and 1 at the task's ceiling."
    parts = [element("p", text, class_="muted"), _scores(benchmark, figures)]
    comparisons = benchmark.summary["comparisons"]
    if comparisons:
        parts += [_verdicts(comparisons, figures), _improvement(benchmark, comparisons, figures)]
    else:
        parts.append(element("p", "There are no two agents with a run in common to compare."))
    parts.append(_profiles(benchmark, figures))
    return element("section", element("h2", "All tasks together", id="scores"), *parts)


def _scores(benchmark: Benchmark, figures: Figures) -> Html:
    entries = benchmark.summary["agents"]
    rows = [
        {"agent": agent, **entry["score"], "runs": entry["runs"], "failed": entry["failed"]}
        for agent, entry in entries.items()
    ]
    drawn = []
    for row in rows:
        runs = f"{row['runs']} run" + ("" if row["runs"] == 1 else "s")
        name = f"{row['agent']}, {runs}" + (f", {row['failed']} failed" if row["failed"] else "")
        value, low, high = (_plain(row[key]) for key in ("value", "low", "high"))
        drawn.append(Interval(name, value, low, high, benchmark.color(row["agent"]).split()[0]))
    label = "interquartile mean over tasks and seeds, 95 % stratified bootstrap interval"
    return figures.chart("scores", IntervalChart("Score", label, drawn, marks=(0.0,)), rows)


def _verdicts(comparisons: Sequence[Mapping[str, Any]], figures: Figures) -> Html:
    """A row for each pair, those that are decided in bold."""
    head: list[str | tuple[str, Sequence[str]]] = ["Pair", "Difference of scores", "95 % interval"]
    head += ["Probability of improvement", "95 % interval", "p (Holm)", "Pairs"]
    rows = [("", _verdict_cells(entry)) for entry in comparisons]
    text = (
        "Better or worse is said only where the interval of the paired differences excludes 0 and p, by sign flips "
        "and adjusted for the number of pairs, is at most 0.05. Runs are paired by their seed, which sets the noise. "
        "The interval of few runs is too narrow, which p is not; of tied differences it may even end at its estimate."
    )
    flat = [
        {
            **{key: entry[key] for key in ("first", "second", "verdict", "p", "pairs")},
            **{f"{key}_{end}": entry[key][end] for key in ("difference", "probability") for end in entry[key]},
        }
        for entry in comparisons
    ]
    parts = [element("p", text, class_="muted"), table("Who is better than whom", head, [rows])]
    return element("div", element("h3", "Who is better than whom"), *parts, figures.data("verdicts", flat))


def _verdict_cells(entry: Mapping[str, Any]) -> list[object]:
    sentence = f"{entry['first']} {_WORDS[entry['verdict']]} {entry['second']}"
    pair = sentence if entry["verdict"] == "undecided" else element("b", sentence)
    difference, probability = entry["difference"], entry["probability"]
    values = [number(difference["value"], "+"), interval(difference)]
    values += [f"{probability['value']:.2f}", interval(probability), f"{entry['p']:.2g}", entry["pairs"]]
    return [pair, *values]


def _improvement(benchmark: Benchmark, comparisons: Sequence[Mapping[str, Any]], figures: Figures) -> Html:
    """The matrix of probabilities that a run of the row's agent scores above one of the column's."""
    found: dict[tuple[str, str], tuple[float, bool]] = {}
    for entry in comparisons:
        value, low, high = (_plain(entry["probability"][key]) for key in ("value", "low", "high"))
        clear = low > 0.5 or high < 0.5
        found[entry["first"], entry["second"]] = value, clear
        found[entry["second"], entry["first"]] = 1 - value, clear
    agents = benchmark.agents
    head = element("tr", element("th", "", scope="col"), *(element("th", name, scope="col") for name in agents))
    body = [
        element("tr", element("th", row, scope="row"), *(_shaded(found.get((row, column))) for column in agents))
        for row in agents
    ]
    text = (
        "How likely a run of the agent on the left scores above one of the agent at the top. Bold: its 95 % interval "
        "excludes one half; blue is above, orange below."
    )
    whole = element("table", element("thead", head), element("tbody", *body))
    box = element(
        "div", whole, class_="scroll plain", tabindex=0, role="region", aria_label="Probability of improvement"
    )
    rows = [{"first": first, "second": second, "probability": value} for (first, second), (value, _) in found.items()]
    title, files = element("h3", "Probability of improvement"), figures.data("improvement", rows)
    return element("div", title, element("p", text, class_="muted"), box, files)


def _shaded(entry: tuple[float, bool] | None) -> Html:
    if entry is None:
        return element("td", "–")
    value, clear = entry
    color = "59 130 246" if value > 0.5 else "234 128 30"
    shade = f"background: rgb({color} / {1.1 * abs(value - 0.5):.2f})"
    return element("td", element("b", f"{value:.2f}") if clear else f"{value:.2f}", style=shade)


def _profiles(benchmark: Benchmark, figures: Figures) -> Html:
    scores = {agent: benchmark.results.scores(agent) for agent in benchmark.agents}
    every = np.concatenate([part for parts in scores.values() for part in parts])
    thresholds = np.linspace(min(0.0, every.min()), max(1.0, every.max()), _THRESHOLDS)
    curves, rows = [], []
    for agent, parts in scores.items():
        found = performance_profile(parts, thresholds)
        band = [(entry.low, entry.high) for entry in found]
        x, y = thresholds.tolist(), [entry.value for entry in found]
        curves.append(Curve(agent, x, y, benchmark.color(agent), band=band, smooth=False, dots=False))
        rows += [
            {"agent": agent, "score": place, "share": entry.value, "low": entry.low, "high": entry.high}
            for place, entry in zip(x, found, strict=True)
        ]
    label = "share of runs above it, 95 % bands"
    chart = LineChart("Performance profiles", "score", label, curves, 260, zero=True, from_zero=False)
    return figures.chart("profiles", chart, rows)


def interval(entry: Mapping[str, Any]) -> str:
    """An interval for people."""
    low, high = _plain(entry["low"]), _plain(entry["high"])
    return f"{number(low)} to {number(high)}" if math.isfinite(low) and math.isfinite(high) else "–"


def _plain(value: float | None) -> float:
    return math.nan if value is None else value
