"""Baseline against tuned, task by task and agent by agent (thesis, table 5.1), and the runs that failed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from diffusion_gym.agents.reporting.benchmark.data import Benchmark
from diffusion_gym.agents.reporting.benchmark.files import Figures
from diffusion_gym.agents.reporting.markup import Html, element, table
from diffusion_gym.agents.reporting.results import number, percent

_BOTH: Final = ("baseline", "tuned")


@dataclass(frozen=True)
class _Column:
    """A measure of the table.

    Attributes:
        key: of the points.
        title: over its columns.
        share: whether it is a share, shown in percent.
        both: whether the pretrained model's value stands beside it.
    """

    key: str
    title: str
    share: bool = False
    both: bool = True


_COLUMNS: Final = (
    _Column("reward", "Reward"),
    _Column("success", "Strict success", share=True),
    _Column("held_out_reward", "Reward, held-out prompts"),
    _Column("held_out_success", "Strict success, held-out", share=True),
    _Column("kl", "KL, nats", both=False),
    _Column("vendi", "Vendi score"),
    _Column("distance", "Feature distance"),
    _Column("all_vendi", "Vendi score, all pictures"),
    _Column("probe", "Probe"),
)


def results_table(benchmark: Benchmark, figures: Figures) -> Html:
    """A row group for each task, a row for each agent: means over seeds and their standard errors."""
    present = {name for task in benchmark.tasks for name in benchmark.measures(task)}
    columns = [column for column in _COLUMNS if column.key in present]
    gap = "held_out_reward" in present
    head: list[str | tuple[str, Sequence[str]]] = ["Task and agent", "Seeds", "Change of reward"]
    head += ["Generalisation gap"] if gap else []
    head += [(column.title, _BOTH) if column.both else (column.title, ("tuned",)) for column in columns]
    groups = [
        [("family", _head_cells(task, columns, gap))]
        + [
            ("", _cells(agent, benchmark.summary["agents"][agent]["tasks"][task], columns, gap))
            for agent in benchmark.agents_of(task)
        ]
        for task in benchmark.tasks
    ]
    text = (
        "Mean over seeds ± standard error of the mean, of pictures from the same noise before and after. The "
        "generalisation gap is what is gained on the training prompts less what is gained on held-out ones. Vendi "
        "score and feature distance are within a prompt: a fall is lost diversity. "
    )
    probes = {task: benchmark.results.suite.tasks[task].probe for task in benchmark.tasks}
    if "probe" in present:
        text += "Probe: " + ", ".join(f"{probe} on {task}" for task, probe in probes.items() if probe) + "."
    files = figures.data("results", _rows(benchmark, columns))
    shown = table("Baseline and tuned, by task and agent", head, groups)
    parts = [element("h2", "Baseline and tuned", id="results"), element("p", text, class_="muted"), shown, files]
    return element("section", *parts)


def failures(benchmark: Benchmark) -> Html:
    """The runs that failed, with the end of their tracebacks; empty where there are none."""
    if not benchmark.results.failures:
        return Html()
    listed = []
    for record in benchmark.results.failures:
        name = f"{record['task']}, {record['agent']}, seed {record['seed']}: "
        head = element("summary", name, element("span", record["error"], class_="muted"))
        lines = "\n".join(record.get("traceback", [])) or "No traceback was kept."
        listed.append(element("details", head, element("pre", element("code", lines), tabindex=0)))
    text = "Their scores are missing above; the same `bench` command tries them again."
    parts = [element("h2", "Failed runs", id="failures"), element("p", text, class_="muted"), *listed]
    return element("section", *parts)


def change(entry: Mapping[str, Any], key: str = "reward") -> float:
    """How much a measure of an agent on a task grew; NaN where it is not measured."""
    return _mean(entry["after"].get(key)) - _mean(entry["before"].get(key))


def _head_cells(task: str, columns: Sequence[_Column], gap: bool) -> list[object]:
    return [task, *[""] * (2 + gap + sum(1 + column.both for column in columns))]


def _cells(agent: str, entry: Mapping[str, Any], columns: Sequence[_Column], gap: bool) -> list[object]:
    cells: list[object] = [agent, len(entry["seeds"]), number(change(entry), "+")]
    if gap:
        cells.append(number(change(entry) - change(entry, "held_out_reward"), "+"))
    for column in columns:
        for part in ("before", "after") if column.both else ("after",):
            cells.append(with_error(entry[part].get(column.key), share=column.share))
    return cells


def with_error(found: Mapping[str, float | None] | None, *, share: bool = False) -> str:
    """A mean and its standard error for people; a dash where there is none."""
    value = _mean(found)
    if found is None or not math.isfinite(value):
        return "–"
    text = percent if share else number
    error = found["standard_error"]
    if error is None:
        return text(value)
    return f"{text(value)} ± {100 * error:.1f}" if share else f"{text(value)} ± {number(error)}"


def _rows(benchmark: Benchmark, columns: Sequence[_Column]) -> list[dict[str, Any]]:
    rows = []
    for task in benchmark.tasks:
        for agent in benchmark.agents_of(task):
            entry = benchmark.summary["agents"][agent]["tasks"][task]
            row: dict[str, Any] = {"task": task, "agent": agent, "seeds": len(entry["seeds"])}
            for column in columns:
                for part, name in zip(("before", "after"), _BOTH, strict=True):
                    found = entry[part].get(column.key, {})
                    row[f"{column.key}_{name}"] = found.get("mean")
                    row[f"{column.key}_{name}_standard_error"] = found.get("standard_error")
            rows.append(row)
    return rows


def _mean(found: Mapping[str, float | None] | None) -> float:
    value = None if found is None else found["mean"]
    return math.nan if value is None else value
