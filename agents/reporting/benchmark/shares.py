"""Shares of a benchmark's pictures: strict successes, and the classes of a reward that is a classifier."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from diffusion_gym.agents.reporting.benchmark.data import Benchmark
from diffusion_gym.agents.reporting.benchmark.files import Figures
from diffusion_gym.agents.reporting.markup import Html, element
from diffusion_gym.agents.reporting.rows import ShareChart

_CLASS: Final = re.compile(r"p\((.+)\)")


def shares(benchmark: Benchmark, figures: Figures) -> Html:
    """Before and after: probability of each class, share of strict successes; empty where no reward has either."""
    charts = []
    for task in benchmark.tasks:
        measures = benchmark.measures(task)
        classes = {name: found[1] for name in measures if (found := _CLASS.fullmatch(name))}
        if classes:
            charts.append(_chart(benchmark, figures, task, "classes", "mean probability of each class", classes))
        if "success" in measures:
            names = {"success": "success", "": "no success"}
            charts.append(_chart(benchmark, figures, task, "success", "share of pictures", names))
    if not charts:
        return Html()
    text = "All pictures of the measurements before and after training, mean over seeds."
    head = [element("h2", "Success and classes", id="shares"), element("p", text, class_="muted")]
    return element("section", *head, element("div", *charts, class_="charts"))


def _chart(
    benchmark: Benchmark, figures: Figures, task: str, name: str, label: str, categories: dict[str, str]
) -> Html:
    agents = benchmark.agents_of(task)
    found = [("pretrained model", _shares(benchmark, agents[0], task, list(categories), 0))]
    found += [(agent, _shares(benchmark, agent, task, list(categories), -1)) for agent in agents]
    named = list(categories.values())
    rows = [{"model": model, **dict(zip(named, values, strict=True))} for model, values in found]
    return figures.chart(f"{name}--{task}", ShareChart(task, label, named, found, strong_first="" in categories), rows)


def _shares(benchmark: Benchmark, agent: str, task: str, measures: Sequence[str], point: int) -> list[float]:
    """A share for each measure; that of "", the last one, is what the others leave."""
    values = [benchmark.means(agent, task, measure)[point] for measure in measures if measure]
    return [*values, 1 - sum(values)] if "" in measures else values
