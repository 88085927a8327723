"""Curves of a benchmark: rewards against what they cost, and measures against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from diffusion_gym.agents.report.benchmark.data import Benchmark
from diffusion_gym.agents.report.benchmark.figures import Figure, Figures
from diffusion_gym.agents.report.charts import Curve, Key, keys_of, line_chart

_COSTS: Final = {
    "reward_queries": "reward queries (images scored)",
    "seconds": "seconds of training",
    "network_evaluations": "network evaluations (samples through the network)",
}


@dataclass(frozen=True)
class _Pair:
    """Two measures against each other, a point for each measurement."""

    name: str
    title: str
    text: str
    x: tuple[str, str]
    y: tuple[str, str]
    from_zero: bool = False
    without: str = ""  # left out where a task has this measure


_PAIRS: Final = (
    _Pair(
        "frontier",
        "Reward against distance from the pretrained model",
        "The higher on the left, the less of the pretrained model the reward costs. KL is the closed form, summed over "
        "the denoising steps of fresh trajectories.",
        ("kl", "KL to the pretrained model, nats"),
        ("reward", "mean reward"),
        True,
    ),
    _Pair(
        "probe",
        "Over-optimisation: the trained reward against one that is only measured",
        "The probe grades the same pictures and is never trained on. Where the trained reward goes on rising and the "
        "probe turns, the reward is gamed or what it leaves out is lost.",
        ("reward", "trained reward"),
        ("probe", "probe"),
    ),
    _Pair(
        "diversity",
        "Diversity against reward",
        "Vendi score within a prompt: the effective number of different pictures. A fall is mode collapse.",
        ("reward", "mean reward"),
        ("vendi", "Vendi score"),
    ),
    _Pair(
        "diversity-all",
        "Diversity of all pictures against reward",
        "Vendi score over all pictures, whatever their prompt.",
        ("reward", "mean reward"),
        ("all_vendi", "Vendi score"),
        without="vendi",
    ),
    _Pair(
        "generalisation",
        "Generalisation: held-out prompts against training prompts",
        "Prompts that training never saw. A curve that turns flat learns its own prompts only.",
        ("reward", "reward, training prompts"),
        ("held_out_reward", "reward, held-out prompts"),
    ),
)


def legend(benchmark: Benchmark, agents: Sequence[str]) -> tuple[Key, ...]:
    """The agents' inks, once for several charts."""
    return keys_of(Curve(agent, (), (), **benchmark.style(agent)) for agent in agents)


def learning(benchmark: Benchmark, figures: Figures) -> dict[str, list[Figure]]:
    """Reward for each task against reward queries (DDPO, figure 3), seconds and network evaluations."""
    return {
        label: [
            _learning_chart(benchmark, figures, task, benchmark.agents_of(task), cost, "reward")
            for task in benchmark.tasks
        ]
        for cost, label in _COSTS.items()
    }


def _learning_chart(
    benchmark: Benchmark, figures: Figures, task: str, agents: Sequence[str], cost: str, name: str
) -> Figure:
    curves = []
    for agent in agents:
        found, x = benchmark.curve(agent, task, "reward"), benchmark.means(agent, task, cost)
        band = [(entry.low, entry.high) for entry in found]
        values = [entry.value for entry in found]
        curves.append(Curve(agent, x, values, **benchmark.style(agent), band=band, smooth=False))
    chart = line_chart(task, _COSTS[cost], "mean reward", curves)
    rows = [row for curve in curves for row in curve.rows(cost, "reward")]
    return figures.chart(f"{name}-{cost.replace('_', '-')}--{task}", chart, rows)


def trade_offs(benchmark: Benchmark, figures: Figures) -> list[tuple[str, str, list[Figure]]]:
    """Title, text and charts of frontier, over-optimisation, diversity and generalisation."""
    found = []
    for pair in _PAIRS:
        tasks = [task for task in benchmark.tasks if _has(benchmark.measures(task), pair)]
        if tasks:
            found.append((pair.title, pair.text, [_pair_chart(benchmark, figures, pair, task) for task in tasks]))
    return found


def _has(measures: Sequence[str], pair: _Pair) -> bool:
    return {pair.x[0], pair.y[0]} <= {*measures} and pair.without not in measures


def _pair_chart(benchmark: Benchmark, figures: Figures, pair: _Pair, task: str) -> Figure:
    (x_name, x_label), (y_name, y_label) = pair.x, pair.y
    if y_name == "probe":
        y_label = f"{benchmark.results.suite.tasks[task].probe or 'probe'}, not trained on"
    curves = []
    for agent in benchmark.agents_of(task):
        x, y = (benchmark.means(agent, task, name) for name in (x_name, y_name))
        curves.append(Curve(agent, x, y, **benchmark.style(agent), smooth=False))
    chart = line_chart(task, x_label, y_label, curves, from_zero=pair.from_zero)
    return figures.chart(f"{pair.name}--{task}", chart, [row for curve in curves for row in curve.rows(x_name, y_name)])


def ablation(benchmark: Benchmark, figures: Figures) -> list[dict[str, Any]]:
    """Agents that differ in `cfg_training` alone, side by side (DDPO, figure 8); empty where there are none."""
    found = []
    for pair in cfg_pairs(benchmark):
        tasks = [task for task in benchmark.tasks if {*pair} <= {*benchmark.agents_of(task)}]
        charts = [_learning_chart(benchmark, figures, task, pair, "reward_queries", "cfg-training") for task in tasks]
        found.append({"both": pair[0], "alone": pair[1], "keys": legend(benchmark, pair), "figures": charts})
    return found


def cfg_pairs(benchmark: Benchmark) -> list[tuple[str, str]]:
    """Pairs of agents whose settings differ in `cfg_training` alone: the one that has it comes first."""
    found = {agent: _without_cfg(benchmark, agent) for agent in sorted(benchmark.agents)}
    return [
        (first, second)
        for first, (trained, settings) in found.items()
        for second, (other, others) in found.items()
        if trained is True and other is False and settings and settings == others
    ]


def _without_cfg(benchmark: Benchmark, agent: str) -> tuple[Any, Mapping[str, Any]]:
    """An agent's `cfg_training`, and its other settings by task: those of the first seed."""
    trained, found = None, {}
    for task in benchmark.results.tasks_of(agent):
        record = benchmark.records(agent, task)[0]
        settings = dict(record.get("settings", {}))
        options = dict(settings.get("agent_options", {}))
        trained = options.pop("cfg_training", None)
        found[task] = {**settings, "trained": record.get("trained"), "seed": None, "agent_options": options}
    return trained, found
