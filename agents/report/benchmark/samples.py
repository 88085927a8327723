"""Single pictures of a benchmark in numbers: how their rewards spread, and where their features move."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from diffusion_gym.agents.report.benchmark.data import Benchmark, Samples
from diffusion_gym.agents.report.benchmark.figures import Figure, Figures
from diffusion_gym.agents.report.charts import Curve, density_chart, map_chart

Array = NDArray[np.float64]

_MARGIN = 0.06  # of the range, around what is drawn


def distributions(benchmark: Benchmark, figures: Figures) -> dict[str, list[Figure]]:
    """By task, the rewards of single pictures against reward queries, all seeds together (thesis, figure 5.3).

    Empty where the run folders are not there. A task whose rewards have two values only is left out: its share of
    successes says it all.
    """
    shown: dict[str, list[Figure]] = {}
    for task in benchmark.tasks:
        rewards = {agent: _rewards(benchmark, agent, task) for agent in benchmark.agents_of(task)}
        rewards = {agent: rows for agent, rows in rewards.items() if len(rows)}
        every = np.concatenate([rows[:, 2] for rows in rewards.values()]) if rewards else np.empty(0)
        if len(np.unique(every)) > 2:
            low, high = _limits(every[:, None])[:, 0]
            shown[task] = [
                _density(benchmark, figures, task, agent, rows, (float(low), float(high)))
                for agent, rows in rewards.items()
            ]
    return shown


def _rewards(benchmark: Benchmark, agent: str, task: str) -> Array:
    """Seed, reward queries and reward of each picture, `(N, 3)`; rewards that are not finite are left out."""
    rows = [np.empty((0, 3))]
    for seed in benchmark.results.seeds(agent, task):
        for entry in benchmark.samples(agent, task, seed):
            if (rewards := entry.tensor("rewards")) is not None:
                values = rewards.double().numpy()
                values = values[np.isfinite(values)]
                rows.append(np.insert(values[:, None], [0], [seed, entry.reward_queries], axis=1))
    return np.concatenate(rows)


def _density(
    benchmark: Benchmark, figures: Figures, task: str, agent: str, rewards: Array, limits: tuple[float, float]
) -> Figure:
    x, y = (benchmark.means(agent, task, key) for key in ("reward_queries", "reward"))
    chart = density_chart(agent, rewards[:, 1:], Curve(agent, x, y, **benchmark.style(agent)), limits)
    rows = [{"seed": int(seed), "reward_queries": int(count), "reward": reward} for seed, count, reward in rewards]
    return figures.chart(f"spread--{task}--{agent}", chart, rows)


def maps(benchmark: Benchmark, figures: Figures) -> dict[str, list[Figure]]:
    """By task, where pictures lie among the pretrained model's, before and after training (thesis, figure 5.14)."""
    shown: dict[str, list[Figure]] = {}
    for task in benchmark.tasks:
        features = {agent: _features(benchmark, agent, task) for agent in benchmark.agents_of(task)}
        known = {agent: vectors for agent, vectors in features.items() if vectors is not None}
        if not known:
            continue
        center, axes = principal_axes(next(iter(known.values()))[0])
        places = {agent: [(part - center) @ axes.T for part in both] for agent, both in known.items()}
        limits = _limits(np.concatenate([part for both in places.values() for part in both]))
        shown[task] = [_map(benchmark, figures, task, agent, both, limits) for agent, both in places.items()]
    return shown


def _features(benchmark: Benchmark, agent: str, task: str) -> tuple[Array, Array] | None:
    """Features of the first and the last measurement of the shown seed; None where they are not there."""
    entries: list[Samples] = benchmark.samples(agent, task, benchmark.shown_seed(agent, task))
    if len(entries) < 2:
        return None
    first, last = entries[0].tensor("features"), entries[-1].tensor("features")
    if first is None or last is None or entries[0].reward_queries or len(first) != len(last) or len(first) < 3:
        return None
    return first.double().numpy(), last.double().numpy()


def _map(benchmark: Benchmark, figures: Figures, task: str, agent: str, both: list[Array], limits: Array) -> Figure:
    rows = [
        {"model": model, "sample": index, "first": place[0], "second": place[1]}
        for model, part in zip(("pretrained", "tuned"), both, strict=True)
        for index, place in enumerate(part)
    ]
    title = f"{agent}, seed {benchmark.shown_seed(agent, task)}"
    chart = map_chart(title, both[0], both[1], limits, benchmark.style(agent)["ink"])
    return figures.chart(f"map--{task}--{agent}", chart, rows)


def principal_axes(features: Array) -> tuple[Array, Array]:
    """Mean `(D,)` and first two principal axes `(2, D)` of features `(N, D)`; an axis' largest entry is positive."""
    center = features.mean(0)
    axes = np.linalg.svd(features - center, full_matrices=False)[2][:2]
    signs = np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])
    return center, axes * np.where(signs == 0, 1, signs)[:, None]


def _limits(values: Array) -> Array:
    """Lower and upper corner `(2, D)` of values `(N, D)`, with a margin."""
    low, high = values.min(0), values.max(0)
    margin = _MARGIN * np.where(high > low, high - low, 1.0)
    return np.stack([low - margin, high + margin])
