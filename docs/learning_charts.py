"""The charts of compare_agents.py, as PNG files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from learning_numbers import Groups, Measure, Record, kl, label, over_seeds
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from diffusion_gym.agents.report.charts import running_mean, window_for


@dataclass(frozen=True)
class Style:
    """How a chart shows an agent."""

    color: str
    line: Any
    marker: str


# Policy gradients are solid lines and circles, reward-weighted regression dashes and squares.
_GRADIENT: Final = partial(Style, line="-", marker="o")
_REGRESSION: Final = partial(Style, line=(0, (5, 2)), marker="s")
# The palette of Okabe and Ito, whose colours do not depend on telling red from green.
_STYLES: Final[dict[str, Style]] = {
    "ddpo_sf": _GRADIENT("#56B4E9"),
    "ddpo_is": _GRADIENT("#0072B2"),
    "ddpo_iskl": _GRADIENT("#009E73"),
    "dpok": _GRADIENT("#CC79A7"),
    "rwr": _REGRESSION("#D55E00"),
    "rwr_sparse": _REGRESSION("#E69F00"),
}
_OTHER: Final = Style("#555555", (0, (1, 1)), "^")
_LABEL_GAP: Final = 0.052  # of the height of the axes
_DPI: Final = 160


def draw_learning_curves(groups: Groups, path: Path) -> None:
    """The measure against reward queries: mean over seeds of the running means, with its 95 % band."""
    measure = Measure.of(groups)
    axes = _axes("reward queries (pictures scored)", f"{measure.name} in training")
    records = [record for own in groups.values() for record in own]
    base = float(np.mean([measure.before(record) for record in records]))
    axes.axhline(base, color="#777777", linestyle=":", linewidth=1.2)
    ends: list[tuple[float, float, str, str]] = [(math.inf, base, "pretrained model", "#555555")]
    for agent, own in groups.items():
        style, (x, mean, low, high) = _STYLES.get(agent, _OTHER), _band(own, measure)
        axes.fill_between(x, low, high, color=style.color, alpha=0.13, linewidth=0)
        axes.plot(x, mean, color=style.color, linestyle=style.line, linewidth=2)
        ends.append((x[-1], mean[-1], label(agent), style.color))
    axes.set_xlim(0, records[0]["total_reward_queries"])
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.autoscale_view()
    _name_lines(axes, ends)
    _save(axes, path)


def _band(own: Sequence[Record], measure: Measure) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Reward queries, mean over seeds, and the ends of its interval; those of one seed are the mean itself."""
    length = min(len(record["curve"]["reward_queries"]) for record in own)
    smooth = [running_mean(record["curve"][measure.curve], window_for(length))[:length] for record in own]
    estimates = [over_seeds(values) for values in zip(*smooth, strict=True)]
    rows = np.array([(entry.mean, entry.low, entry.high) for entry in estimates])
    mean = rows[:, 0]
    low, high = (np.clip(np.where(np.isnan(end), mean, end), measure.low, measure.high) for end in rows[:, 1:].T)
    return np.array(own[0]["curve"]["reward_queries"][:length]), mean, low, high


def _name_lines(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each line's name right of the axes, at the height of its end, or as near as there is room."""
    bottom, top = axes.get_ylim()
    heights = [(y - bottom) / (top - bottom) for _, y, _, _ in ends]
    right = axes.get_xlim()[1]
    for place, height, (x, _, name, color) in zip(spread(heights, _LABEL_GAP), heights, ends, strict=True):
        axes.annotate(
            name,
            xy=(min(1.0, x / right), height),
            xytext=(1.05, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=color,
            va="center",
            fontsize=10,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.8, "relpos": (0, 0.5)},
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights from 0 to 1, in the same order and at least `gap` apart, with the least squared movement."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    blocks: list[list[float]] = []  # isotonic regression of what is left without the gaps: neighbours are pooled
    for rank, index in enumerate(order):
        blocks.append([heights[index] - rank * gap])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    bases = [min(max(float(np.mean(block)), 0.0), 1 - (len(order) - 1) * gap) for block in blocks for _ in block]
    placed = [base + rank * gap for rank, base in enumerate(bases)]
    return [place for _, place in sorted(zip(order, placed, strict=True))]


def draw_reward_against_kl(groups: Groups, path: Path) -> None:
    """Final reward against KL to the pretrained model, a point a run; KL on a square-root scale."""
    axes = _axes("KL to the pretrained model, nats a trajectory (square-root scale)", "reward after training")
    base = np.mean([record["evaluation"]["base_reward_mean"] for own in groups.values() for record in own])
    axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.plot(0, base, "*", color="black", markersize=13, linestyle="none", label="pretrained model", clip_on=False)
    for agent, own in groups.items():
        style = _STYLES.get(agent, _OTHER)
        rewards = [record["evaluation"]["reward_mean"] for record in own]
        look = {"color": style.color, "marker": style.marker, "markersize": 8, "markeredgecolor": "white"}
        axes.plot([kl(record) for record in own], rewards, linestyle="none", label=label(agent), **look)
    limit = 1.08 * max(1e-9, *(kl(record) for own in groups.values() for record in own))
    axes.set_xlim(0, limit)
    axes.set_xticks(_square_root_ticks(limit))
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    _save(axes, path)


def _square_root_ticks(limit: float) -> list[float]:
    """0 and the numbers 1, 2 and 5 times a power of ten, down to where their labels would touch."""
    power = 10.0 ** math.floor(math.log10(limit))
    steps = (factor * power * scale for scale in (0.01, 0.1, 1.0) for factor in (1, 2, 5))
    return [0.0, *(step for step in steps if limit / 40 <= step <= limit)]


def _axes(x_label: str, y_label: str) -> Axes:
    axes = Figure(figsize=(8.4, 4.6), layout="constrained").subplots()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _save(axes: Axes, path: Path) -> None:
    axes.get_figure().savefig(path, dpi=_DPI, metadata={"Software": None})
