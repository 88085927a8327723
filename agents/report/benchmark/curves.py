"""Curves of a benchmark: rewards against what they cost, and measures against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from diffusion_gym.agents.report.benchmark.data import Benchmark
from diffusion_gym.agents.report.benchmark.figures import Figure, Figures
from diffusion_gym.agents.report.charts import Curve, line_chart

COSTS: Final = {
    "reward_queries": "reward queries (images scored)",
    "seconds": "seconds of training",
    "network_evaluations": "network evaluations (samples through the network)",
}
_LABELS: Final = COSTS | {
    "reward": "mean reward",
    "kl": "KL to the pretrained model, nats",
    "probe": "a reward that is not trained on",
    "vendi": "Vendi score",
    "all_vendi": "Vendi score",
    "held_out_reward": "mean reward, held-out prompts",
}
# Two measures against each other, a point for each measurement; the page has their titles.
_PAIRS: Final = {
    "frontier": ("kl", "reward"),
    "probe": ("reward", "probe"),
    "diversity": ("reward", "vendi"),
    "diversity-all": ("reward", "all_vendi"),
    "generalisation": ("reward", "held_out_reward"),
}


def learning(benchmark: Benchmark, figures: Figures) -> dict[str, list[Figure]]:
    """By what it costs, the reward that each task is judged on (DDPO, figure 3)."""
    return {
        cost: [
            _learning(benchmark, figures, "reward", task, benchmark.agents_of(task), cost) for task in benchmark.tasks
        ]
        for cost in COSTS
    }


def _learning(benchmark: Benchmark, figures: Figures, name: str, task: str, agents: Sequence[str], cost: str) -> Figure:
    name = f"{name}-{cost.replace('_', '-')}--{task}"
    return _figure(benchmark, figures, name, task, agents, (cost, _judged_on(benchmark, task)), band=True)


def _judged_on(benchmark: Benchmark, task: str) -> str:
    return benchmark.results.suite.tasks[task].judged_on


def trade_offs(benchmark: Benchmark, figures: Figures) -> dict[str, list[Figure]]:
    """Frontier, over-optimisation, diversity and generalisation, where the records have both measures."""
    charts: dict[str, list[Figure]] = {}
    for name, named in _PAIRS.items():
        for task in benchmark.tasks:
            pair = ("kl", _judged_on(benchmark, task)) if name == "frontier" else named
            measures = {*benchmark.measures(task)}
            if {*pair} <= measures and not (name == "diversity-all" and "vendi" in measures):
                drawn = _figure(benchmark, figures, f"{name}--{task}", task, benchmark.agents_of(task), pair)
                charts.setdefault(name, []).append(drawn)
    return charts


def _figure(
    benchmark: Benchmark,
    figures: Figures,
    name: str,
    task: str,
    agents: Sequence[str],
    pair: tuple[str, str],
    *,
    band: bool = False,
) -> Figure:
    """A curve for each agent; `band` adds the 95 % intervals over seeds."""
    x, y = pair
    curves = []
    for agent in agents:
        estimates = benchmark.curve(agent, task, y)
        values, ends = [entry.value for entry in estimates], [(entry.low, entry.high) for entry in estimates]
        style = benchmark.style(agent) | {"band": ends if band else (), "smooth": False}
        curves.append(Curve(agent, benchmark.means(agent, task, x), values, **style))
    probe = benchmark.results.suite.tasks[task].probe
    label = f"{probe}, not trained on" if y == "probe" and probe else _LABELS[y]
    chart = line_chart(task, _LABELS[x], label, curves, from_zero=x == "kl" or x in COSTS)
    return figures.chart(name, chart, [row for curve in curves for row in curve.rows(x, y)])


def ablation(benchmark: Benchmark, figures: Figures) -> dict[tuple[str, str], list[Figure]]:
    """Agents that differ in `cfg_training` alone, side by side (DDPO, figure 8); empty where there are none."""
    return {
        pair: [
            _learning(benchmark, figures, "cfg-training", task, pair, "reward_queries")
            for task in benchmark.tasks
            if {*pair} <= {*benchmark.agents_of(task)}
        ]
        for pair in cfg_pairs(benchmark)
    }


def cfg_pairs(benchmark: Benchmark) -> list[tuple[str, str]]:
    """Pairs of agents whose settings differ in `cfg_training` alone: the one that has it comes first."""
    variants = {agent: _without_cfg(benchmark, agent) for agent in sorted(benchmark.agents)}
    return [
        (first, second)
        for first, (trained, settings) in variants.items()
        for second, (other, others) in variants.items()
        if trained is True and other is False and settings and settings == others
    ]


def _without_cfg(benchmark: Benchmark, agent: str) -> tuple[Any, Mapping[str, Any]]:
    """An agent's `cfg_training`, and its other settings by task: those of the first seed."""
    trained, settings_of = None, {}
    for task in benchmark.results.tasks_of(agent):
        record = benchmark.records(agent, task)[0]
        settings = dict(record.get("settings", {}))
        options = dict(settings.get("agent_options", {}))
        trained = options.pop("cfg_training", None)
        settings_of[task] = {**settings, "trained": record.get("trained"), "seed": None, "agent_options": options}
    return trained, settings_of
