"""Single pictures of a benchmark in numbers: how their rewards spread, and where their features move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffusion_gym.agents.reporting.benchmark.data import Benchmark, Samples
from diffusion_gym.agents.reporting.benchmark.files import Figures
from diffusion_gym.agents.reporting.benchmark.plots import embedding, hexbin, principal_axes
from diffusion_gym.agents.reporting.markup import Html, element

_MARGIN = 0.06  # of the range, around what is drawn


def distributions(benchmark: Benchmark, figures: Figures) -> Html:
    """The rewards of single pictures against reward queries, all seeds together (thesis, figure 5.3).

    Empty where the run folders are not there. A task whose rewards have two values only is left out: its share of
    successes says it all.
    """
    shown: dict[str, list[Html]] = {}
    for task in benchmark.tasks:
        spread = {agent: _rewards(benchmark, agent, task) for agent in benchmark.agents_of(task)}
        spread = {agent: found for agent, found in spread.items() if len(found)}
        every = np.concatenate([found[:, 2] for found in spread.values()]) if spread else np.empty(0)
        if len(np.unique(every)) > 2:
            limits = _limits(every[:, None])
            shown[task] = [
                _hexbin(benchmark, figures, task, agent, found, (float(limits[0][0]), float(limits[1][0])))
                for agent, found in spread.items()
            ]
    if not shown:
        return Html()
    text = (
        "Every picture of every measurement, all seeds together; the line is the mean. Tasks whose reward has two "
        "values only are left out: the shares of successes say as much."
    )
    head = [element("h2", "Spread of the rewards", id="spread"), element("p", text, class_="muted")]
    return element("section", *head, *_folded(shown))


def maps(benchmark: Benchmark, figures: Figures) -> Html:
    """Where pictures lie among those of the pretrained model, before and after training (thesis, figure 5.14)."""
    shown: dict[str, list[Html]] = {}
    for task in benchmark.tasks:
        features = {agent: _features(benchmark, agent, task) for agent in benchmark.agents_of(task)}
        places = _places({agent: found for agent, found in features.items() if found is not None})
        if places:
            limits = _limits(np.concatenate([part for both in places.values() for part in both]))
            shown[task] = [_map(benchmark, figures, task, agent, both, limits) for agent, both in places.items()]
    if not shown:
        return Html()
    text = (
        "Features of the pictures by the pretrained network, along the two principal components of the pretrained "
        "model's; a line joins the two pictures of one noise. Points that draw together are mode collapse."
    )
    head = [element("h2", "Maps of mode collapse", id="maps"), element("p", text, class_="muted")]
    return element("section", *head, *_folded(shown))


def _folded(tasks: Mapping[str, Sequence[Html]]) -> list[Html]:
    """The panels of each task, folded but for the first."""
    parts = []
    for index, (task, panels) in enumerate(tasks.items()):
        grid = element("div", *panels, class_="charts")
        parts.append(element("details", element("summary", task), grid, **({} if index else {"open": ""})))
    return parts


def _rewards(benchmark: Benchmark, agent: str, task: str) -> NDArray[np.float64]:
    """Seed, reward queries and reward of each picture, `(N, 3)`; rewards that are not finite are left out."""
    rows = [np.empty((0, 3))]
    for seed in benchmark.results.seeds(agent, task):
        for entry in benchmark.samples(agent, task, seed):
            rewards = entry.tensor("rewards")
            if rewards is not None:
                values = rewards.double().numpy()
                values = values[np.isfinite(values)]
                rows.append(
                    np.stack([np.full_like(values, seed), np.full_like(values, entry.reward_queries), values], 1)
                )
    return np.concatenate(rows)


def _hexbin(
    benchmark: Benchmark,
    figures: Figures,
    task: str,
    agent: str,
    found: NDArray[np.float64],
    limits: tuple[float, float],
) -> Html:
    mean = benchmark.means(agent, task, "reward_queries"), benchmark.means(agent, task, "reward")
    svg = hexbin(found[:, 1], found[:, 2], mean, limits, benchmark.color(agent))
    rows = [{"seed": int(seed), "reward_queries": int(count), "reward": reward} for seed, count, reward in found]
    return figures.plot(f"spread--{task}--{agent}", agent, svg, rows, f"{agent} on {task}: density of rewards")


def _features(benchmark: Benchmark, agent: str, task: str) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Features of the first and the last measurement of the shown seed; None where they are not there."""
    entries: list[Samples] = benchmark.samples(agent, task, benchmark.shown_seed(agent, task))
    if len(entries) < 2:
        return None
    first, last = entries[0].tensor("features"), entries[-1].tensor("features")
    if first is None or last is None or entries[0].reward_queries or len(first) != len(last) or len(first) < 3:
        return None
    return first.double().numpy(), last.double().numpy()


def _places(features: dict[str, Any]) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Both measurements in the plane of the pretrained model's components, the same for all agents."""
    if not features:
        return {}
    center, axes = principal_axes(next(iter(features.values()))[0])
    return {agent: tuple((part - center) @ axes.T for part in both) for agent, both in features.items()}  # type: ignore[misc]


def _map(
    benchmark: Benchmark,
    figures: Figures,
    task: str,
    agent: str,
    both: tuple[NDArray[np.float64], NDArray[np.float64]],
    limits: tuple[NDArray[np.float64], NDArray[np.float64]],
) -> Html:
    svg = embedding(*both, limits, benchmark.color(agent))
    rows = [
        {"model": model, "sample": index, "first": place[0], "second": place[1]}
        for model, part in zip(("pretrained", "tuned"), both, strict=True)
        for index, place in enumerate(part)
    ]
    title = f"{agent}, seed {benchmark.shown_seed(agent, task)}"
    return figures.plot(f"map--{task}--{agent}", title, svg, rows, f"{agent} on {task}: map of features")


def _limits(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    low, high = values.min(0), values.max(0)
    margin = _MARGIN * np.where(high > low, high - low, 1.0)
    return low - margin, high + margin
