"""Curves of a benchmark: rewards against what they cost, and measures against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from diffusion_gym.agents.reporting.benchmark.data import Benchmark
from diffusion_gym.agents.reporting.benchmark.files import Figures
from diffusion_gym.agents.reporting.charts import Curve, LineChart
from diffusion_gym.agents.reporting.drawing import Key, legend_of
from diffusion_gym.agents.reporting.markup import Html, element, note

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


def legend(benchmark: Benchmark, agents: Sequence[str]) -> Html:
    """The agents' colours, once for several charts."""
    return element("div", legend_of([Key(agent, benchmark.color(agent)) for agent in agents]), class_="chart")


def learning(benchmark: Benchmark, figures: Figures) -> Html:
    """Reward against reward queries for each task (DDPO, figure 3), and against seconds and network evaluations."""
    text = "Mean over seeds; bands are 95 % bootstrap intervals. The first point is the pretrained model."
    if (
        benchmark.tasks
        and max(len(benchmark.records(a, t)) for t in benchmark.tasks for a in benchmark.agents_of(t)) < 2
    ):
        text += " With one seed there is no band."
    parts = [element("p", text, class_="muted"), legend(benchmark, benchmark.agents)]
    for index, (cost, label) in enumerate(_COSTS.items()):
        charts = [
            _learning_chart(benchmark, figures, task, benchmark.agents_of(task), cost, "reward")
            for task in benchmark.tasks
        ]
        grid = element("div", *charts, class_="charts")
        title = element("summary", f"Against {label}")
        parts.append(grid if index == 0 else element("details", title, grid))
    return element("section", element("h2", "Learning curves", id="learning"), *parts)


def _learning_chart(
    benchmark: Benchmark, figures: Figures, task: str, agents: Sequence[str], cost: str, name: str
) -> Html:
    curves, rows = [], []
    for agent in agents:
        found, x = benchmark.curve(agent, task, "reward"), benchmark.means(agent, task, cost)
        band = [(entry.low, entry.high) for entry in found]
        curves.append(_curve(benchmark, agent, x, [entry.value for entry in found], band))
        rows += [
            {"agent": agent, cost: place, "reward": entry.value, "low": entry.low, "high": entry.high}
            for place, entry in zip(x, found, strict=True)
        ]
    chart = LineChart(task, _COSTS[cost], "mean reward", curves, 230)
    return figures.chart(f"{name}-{cost.replace('_', '-')}--{task}", chart, rows, legend=False)


def _curve(
    benchmark: Benchmark, agent: str, x: Sequence[float], y: Sequence[float], band: Sequence[tuple[float, float]] = ()
) -> Curve:
    return Curve(agent, x, y, benchmark.color(agent), band=band, smooth=False)


def trade_offs(benchmark: Benchmark, figures: Figures) -> Html:
    """Frontier, over-optimisation, diversity and generalisation: one measure against another."""
    text = "Each point is a measurement, mean over seeds; a curve begins at the pretrained model."
    parts = [element("p", text, class_="muted"), legend(benchmark, benchmark.agents)]
    for pair in _PAIRS:
        tasks = [task for task in benchmark.tasks if _has(benchmark.measures(task), pair)]
        if not tasks:
            continue
        charts = [_pair_chart(benchmark, figures, pair, task) for task in tasks]
        parts += [element("h3", pair.title), element("p", pair.text, class_="muted")]
        parts.append(element("div", *charts, class_="charts"))
    if len(parts) == 2:
        parts = [note("The records have neither KL, diversity, a probe nor held-out prompts.")]
    return element("section", element("h2", "What the reward costs", id="trade-offs"), *parts)


def _has(measures: Sequence[str], pair: _Pair) -> bool:
    return {pair.x[0], pair.y[0]} <= {*measures} and pair.without not in measures


def _pair_chart(benchmark: Benchmark, figures: Figures, pair: _Pair, task: str) -> Html:
    (x_name, x_label), (y_name, y_label) = pair.x, pair.y
    if y_name == "probe":
        y_label = f"{benchmark.results.suite.tasks[task].probe or 'probe'}, not trained on"
    curves, rows = [], []
    for agent in benchmark.agents_of(task):
        x, y = (benchmark.means(agent, task, name) for name in (x_name, y_name))
        curves.append(_curve(benchmark, agent, x, y))
        rows += [{"agent": agent, x_name: a, y_name: b} for a, b in zip(x, y, strict=True)]
    chart = LineChart(task, x_label, y_label, curves, 230, from_zero=pair.from_zero)
    return figures.chart(f"{pair.name}--{task}", chart, rows, legend=False)


def ablation(benchmark: Benchmark, figures: Figures) -> Html:
    """Agents that differ in `cfg_training` alone, side by side (DDPO, figure 8); empty where there are none."""
    text = "Both branches of the guidance trained, against the conditional one alone; all other settings are the same."
    parts = []
    for pair in cfg_pairs(benchmark):
        tasks = [task for task in benchmark.tasks if {*pair} <= {*benchmark.agents_of(task)}]
        charts = [_learning_chart(benchmark, figures, task, pair, "reward_queries", "cfg-training") for task in tasks]
        both, alone = pair
        parts += [element("h3", f"{both}: both branches; {alone}: the conditional one"), legend(benchmark, pair)]
        parts.append(element("div", *charts, class_="charts"))
    if not parts:
        return Html()
    head = element("h2", "CFG training", id="cfg-training")
    return element("section", head, element("p", text, class_="muted"), *parts)


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
