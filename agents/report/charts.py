"""Charts by matplotlib as SVG without colours of their own: inks are variables of the page's style, light or dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from diffusion_gym.agents.report.numbers import number, percent

Points = Sequence[tuple[float, float]]

WIDTH: Final = 460  # pixels, about what a phone shows, so that letters stay legible there
_LEFT, _RIGHT, _TOP, _BELOW = 48, 20, 14, 42  # pixels around a plot
_ROW: Final = 46  # pixels of a row of a chart of rows
_STEPS: Final = (1, 2, 2.5, 5, 10)  # between ticks, times a power of ten
_SERIES: Final = tuple(f"series-{index}" for index in range(1, 9))
# matplotlib wants colours; each of these stands for a variable of the style, which replaces it in the SVG.
_INKS: Final = {name: f"#f0a1{index:02x}" for index, name in enumerate((*_SERIES, "muted", "line", "text"))}
_STYLE: Final[dict[str, Any]] = {
    "svg.fonttype": "none",  # text stays text
    "path.simplify": False,
    "font.size": 12,
    "text.color": _INKS["muted"],
    "axes.labelcolor": _INKS["muted"],
    "xtick.labelcolor": _INKS["muted"],
    "ytick.labelcolor": _INKS["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.spines.bottom": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _INKS["line"],
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-3, 6),
}


@dataclass(frozen=True)
class Curve:
    """Points and a line.

    Attributes:
        name: what the legend calls it.
        x: where the points are.
        y: their values; what is not finite is left out.
        ink: `series-1` to `series-8` of the page's style.
        dashed: whether the line is.
        level: a value to compare with, as a dotted horizontal line.
        band: lower and upper end of an interval at each point; empty for none.
        smooth: whether the line is the running mean, or goes through the points.
        dots: whether the points are drawn.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    ink: str = "series-1"
    dashed: bool = False
    level: float | None = None
    band: Points = ()
    smooth: bool = True
    dots: bool = True

    def points(self) -> list[tuple[float, float]]:
        """The finite points."""
        return [(x, y) for x, y in zip(self.x, self.y, strict=True) if math.isfinite(x) and math.isfinite(y)]

    def rows(self, x: str, y: str) -> list[dict[str, Any]]:
        """The points as rows of a table with the columns `agent`, `x`, `y` and, of a band, `low` and `high`."""
        rows: list[dict[str, Any]] = [{"agent": self.name, x: a, y: b} for a, b in zip(self.x, self.y, strict=True)]
        if not self.band:
            return rows
        return [row | {"low": low, "high": high} for row, (low, high) in zip(rows, self.band, strict=True)]


@dataclass(frozen=True)
class Key:
    """An entry of a legend: its name, its ink, whether the line is dashed or dotted, and how strong it is."""

    name: str
    ink: str
    line: str = "solid"
    opacity: float = 1.0


@dataclass(frozen=True)
class Interval:
    """A row: a value, and the ends of its interval, NaN for none."""

    name: str
    value: float
    low: float
    high: float
    ink: str = "series-1"


@dataclass(frozen=True)
class Chart:
    """A drawing and what stands around it.

    Attributes:
        title: what it shows.
        label: name and unit of its values.
        svg: the elements of the drawing; empty where there is nothing to draw.
        height: of the drawing in pixels; its width is `WIDTH`.
        spoken: the chart in words, for those who cannot see it.
        keys: the legend.
    """

    title: str
    label: str
    svg: Markup
    height: float
    spoken: str
    keys: tuple[Key, ...] = ()
    width: int = WIDTH


def keys_of(curves: Iterable[Curve]) -> tuple[Key, ...]:
    """The legend of curves."""
    return tuple(Key(curve.name, curve.ink, "dashed" if curve.dashed else "solid") for curve in curves)


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    curves: Sequence[Curve],
    *,
    height: int = 230,
    zero: bool = False,
    from_zero: bool = True,
) -> Chart:
    """Curves over one x axis.

    Args:
        title: what the chart shows.
        x_label: name and unit of the x axis.
        y_label: name and unit of the y axis.
        curves: what to draw; a legend names them, and the dotted levels, if there is more than one line.
        height: of the drawing, in pixels; its width is `WIDTH`.
        zero: whether the y axis includes 0.
        from_zero: whether the x axis begins at 0.
    """
    points = [point for curve in curves for point in curve.points()]
    if not points:
        return Chart(title, y_label, Markup(), 0, f"{title}: no finite value.")
    plot = _Plot(height)
    for curve in curves:
        _draw_curve(plot.axes, curve)
    if zero:
        plot.axes.set_ylim(bottom=min(0.0, plot.axes.get_ylim()[0]) if min(y for _, y in points) < 0 else 0.0)
    if from_zero:
        plot.axes.set_xlim(min(0.0, min(x for x, _ in points)), max(x for x, _ in points) or 1.0)
    plot.ticks(whole=all(float(x).is_integer() for x, _ in points))
    plot.axes.set_xlabel(x_label)
    plot.axes.grid(visible=False, axis="x")
    first, last = curves[0].points()[:1], curves[0].points()[-1:]
    ends = [f"from {a[1]:.4g} at {a[0]:g} to {b[1]:.4g} at {b[0]:g}" for a, b in zip(first, last, strict=True)]
    leveled = [Key("pretrained model", curve.ink, "dotted") for curve in curves if curve.level is not None]
    keys = (*keys_of(curves), *leveled[-1:]) if len(curves) + len(leveled) > 1 else ()
    return Chart(title, y_label, plot.svg(title), height, f"{title}: {y_label} {' '.join(ends)} {x_label}.", keys)


def interval_chart(title: str, label: str, rows: Sequence[Interval], *, mark: float = 0.0) -> Chart:
    """A value and its interval in each row; `mark` is a value to compare with, a dotted line."""
    spoken = f"{title}: " + ", ".join(f"{row.name} {_interval_text(row)}" for row in rows) + "."
    if not any(math.isfinite(row.value) for row in rows):
        return Chart(title, label, Markup(), 0, spoken)
    plot = _Plot(_ROW * len(rows) + _BELOW, left=_RIGHT)
    for index, row in enumerate(rows):
        line = {"color": _INKS[row.ink], "solid_capstyle": "round", "clip_on": False}
        plot.named_row(index, row.name, _interval_text(row))
        plot.axes.plot([row.low, row.high], [index + 0.15] * 2, linewidth=5, alpha=0.45, **line)
        plot.axes.plot([row.value], [index + 0.15], "o", markersize=9, markeredgewidth=0, **line)
    plot.axes.axvline(mark, color=_INKS["muted"], linestyle=":", linewidth=1)
    plot.rows(len(rows))
    plot.ticks()
    return Chart(title, label, plot.svg(title), plot.height, spoken)


def share_chart(
    title: str,
    label: str,
    categories: Sequence[str],
    rows: Sequence[tuple[str, Sequence[float]]],
    *,
    strong_first: bool = False,
) -> Chart:
    """A whole in each row, divided among categories, from faint to strong.

    Args:
        title: what the chart shows.
        label: of what the shares are.
        categories: in the order of the shares.
        rows: name and shares, from top to bottom.
        strong_first: whether the first category is the strongest; its share is written out, else the last one's.
    """
    plot, told = _Plot(_ROW * len(rows) + _BELOW, left=_RIGHT), 0 if strong_first else -1
    strength = np.linspace(1, 0.15, len(categories)) if strong_first else np.linspace(0.15, 1, len(categories))
    for index, (name, shares) in enumerate(rows):
        plot.named_row(index, name, f"{categories[told]} {percent(shares[told])}")
        left = 0.0
        for share, alpha in zip(shares, strength, strict=True):
            if math.isfinite(share):
                plot.axes.barh(index + 0.15, share, 0.4, left, color=_INKS["series-1"], alpha=alpha, clip_on=False)
                left += share
    plot.rows(len(rows))
    plot.axes.set_xlim(0, 1)
    plot.axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    keys = tuple(Key(name, "series-1", "block", float(a)) for name, a in zip(categories, strength, strict=True))
    told_rows = [
        f"{name} " + ", ".join(f"{kind} {percent(share)}" for kind, share in zip(categories, shares, strict=True))
        for name, shares in rows
    ]
    return Chart(title, label, plot.svg(title), plot.height, f"{title}: {'; '.join(told_rows)}.", keys)


def density_chart(title: str, points: NDArray[np.float64], mean: Curve, limits: tuple[float, float]) -> Chart:
    """How the rewards of single pictures are spread, measurement by measurement (thesis, figure 5.3).

    Args:
        title: what the chart shows.
        points: reward queries and reward of each picture, `(N, 2)`.
        mean: of the measurements, drawn as a line; the density has its ink.
        limits: of the reward axis.
    """
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    plot, (queries, rewards) = _Plot(230), points.T
    last, columns = float(queries.max()), max(8, 2 * len(np.unique(queries)))
    across = last * (0.5 / columns) if last else 1.0
    ink = to_rgb(_INKS[mean.ink])
    fading = LinearSegmentedColormap.from_list("fading", [(*ink, 0.12), (*ink, 1.0)])
    extent = (-across, last + across, *limits)
    drawn = plot.axes.hexbin(
        queries, rewards, gridsize=(columns, 14), extent=extent, mincnt=1, cmap=fading, linewidths=0, clip_on=False
    )
    plot.axes.plot(mean.x, mean.y, color=_INKS["text"], linewidth=2, clip_on=False)
    plot.axes.set(xlim=extent[:2], ylim=limits, xlabel="reward queries")
    plot.ticks(whole=True)
    most = int(drawn.get_array().max())
    label = f"reward of a picture; the strongest colour is {most:,} picture{'s' if most > 1 else ''}"
    return Chart(title, label, plot.svg(title), plot.height, f"{title}: density of rewards.")


def map_chart(
    title: str, before: NDArray[np.float64], after: NDArray[np.float64], limits: NDArray[np.float64], ink: str
) -> Chart:
    """A map of pictures before and after, those from the same noise joined by a line (thesis, figure 5.14).

    Args:
        title: what the chart shows.
        before: places of the pretrained model's pictures, `(N, 2)`.
        after: of the trained model's, from the same noise.
        limits: lower and upper corner of the map, `(2, 2)`.
        ink: of the trained model's.
    """
    plot, gaps = _Plot(300), np.full((len(before), 1), np.nan)
    joined = [np.hstack([before[:, [axis]], after[:, [axis]], gaps]).ravel() for axis in (0, 1)]
    plot.axes.plot(*joined, color=_INKS["muted"], linewidth=0.6, alpha=0.35, clip_on=False)
    _draw_dots(plot.axes, before.tolist(), _INKS["muted"], alpha=0.6)
    _draw_dots(plot.axes, after.tolist(), _INKS[ink], alpha=0.85)
    plot.axes.set(xlim=limits[:, 0], ylim=limits[:, 1], xlabel="first component")
    plot.ticks()
    keys = (Key("pretrained", "muted", "block", 0.6), Key("tuned", ink, "block"))
    return Chart(title, "second component", plot.svg(title), plot.height, f"{title}: map of features.", keys)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and the up to `window - 1` values before it."""
    parts = [values[max(0, end - window) : end] for end in range(1, len(values) + 1)]
    return [sum(part) / len(part) for part in parts]


def window_for(number: int) -> int:
    """How many of `number` values a running mean takes together."""
    return max(1, min(20, number // 8))


class _Plot:
    """A figure of matplotlib with one plot, without its global state of current figures."""

    def __init__(self, height: int, left: int = _LEFT) -> None:
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        self.height = height
        with rc_context(_STYLE):
            self.figure = Figure(figsize=(WIDTH / 72, height / 72))  # of 72 pixels an inch, as in the SVG
            place = (left / WIDTH, _BELOW / height, 1 - (left + _RIGHT) / WIDTH, 1 - (_BELOW + _TOP) / height)
            self.axes: Any = self.figure.add_axes(place)
        self.figure.patch.set_visible(False)
        self.axes.patch.set_visible(False)

    def ticks(self, *, whole: bool = False) -> None:
        """Few round ticks on both axes; those of the x axis are whole numbers if it counts."""
        from matplotlib.ticker import MaxNLocator, StrMethodFormatter

        self.axes.xaxis.set_major_locator(MaxNLocator(4, integer=whole, steps=_STEPS))
        if self.axes.yaxis.get_visible():
            self.axes.yaxis.set_major_locator(MaxNLocator(4, steps=_STEPS))
        if whole:
            self.axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))

    def named_row(self, index: int, name: str, value: str) -> None:
        """The name above a row at its left, and its value at its right."""
        place = {"transform": self.axes.get_yaxis_transform(), "parse_math": False}
        self.axes.text(0, index - 0.2, name, color=_INKS["text"], **place)
        self.axes.text(1, index - 0.2, value, horizontalalignment="right", **place)

    def rows(self, number: int) -> None:
        """Rows from top to bottom, without an axis for them."""
        self.axes.set_ylim(number - 0.5, -0.5)
        self.axes.yaxis.set_visible(False)

    def svg(self, salt: str) -> Markup:
        """The elements of the drawing; the ids in it depend on `salt` and on what is drawn."""
        from matplotlib import rc_context

        stream = io.StringIO()
        with rc_context(_STYLE | {"svg.hashsalt": salt}):
            self.figure.savefig(stream, format="svg", metadata={"Date": None})
        return _compact(stream.getvalue())


def _draw_curve(axes: Any, curve: Curve) -> None:
    ink = _INKS[curve.ink]
    points = curve.points()
    x, y = ([point[axis] for point in points] for axis in (0, 1))
    mean = running_mean(y, window_for(len(y)) if curve.smooth else 1)
    if curve.band:
        rows = [(at, *ends) for at, ends in zip(curve.x, curve.band, strict=True)]
        if rows := [row for row in rows if all(map(math.isfinite, row))]:
            axes.fill_between(*zip(*rows, strict=True), color=ink, alpha=0.16, linewidth=0, clip_on=False)
    if curve.level is not None:
        axes.axhline(curve.level, color=ink, linestyle=":", linewidth=1.5, clip_on=False)
    if curve.dots:
        _draw_dots(axes, points, ink, alpha=0.4)
    axes.plot(x, mean, color=ink, linestyle="--" if curve.dashed else "-", linewidth=2, clip_on=False)


def _draw_dots(axes: Any, points: Points, ink: str, *, alpha: float) -> None:
    """Strokes of no length with round ends: one path, where a marker for each point takes four times the bytes."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    path = Path(np.repeat(points, 2, axis=0), [Path.MOVETO, Path.LINETO] * len(points)) if points else Path([(0, 0)])
    axes.add_patch(PathPatch(path, color=ink, fill=False, linewidth=5, capstyle="round", alpha=alpha, clip_on=False))
    axes.autoscale_view()


def _compact(text: str) -> Markup:
    """matplotlib's SVG without groups, fonts, metadata and digits that nobody sees, and with the style's variables."""
    for name, ink in _INKS.items():
        text = text.replace(ink, f"var(--{name})")
    parts = [ElementTree.tostring(node, encoding="unicode").strip() for node in _flat(ElementTree.fromstring(text))]
    return Markup("\n".join(parts))


def _flat(node: ElementTree.Element) -> Iterable[ElementTree.Element]:
    for child in node:
        tag = child.tag.rpartition("}")[2]
        if tag == "g":
            yield from _flat(child)
        elif tag == "defs":
            inner = ElementTree.Element("defs")
            inner.extend(part for part in _flat(child) if part.tag == "path")
            if len(inner):
                yield inner
        elif tag != "metadata":
            found = ElementTree.Element(tag, _attributes(child))
            found.text = child.text
            yield found


def _attributes(node: ElementTree.Element) -> dict[str, str]:
    found = {key.rpartition("}")[2]: value for key, value in node.items() if not value.startswith("rotate(-0 ")}
    found.pop("clip-path", None)  # nothing is drawn beyond the axes
    for key in {"d", "x", "y"} & set(found):
        found[key] = re.sub(r"-?\d+\.\d+", lambda digits: f"{float(digits[0]):.1f}".removesuffix(".0"), found[key])
        found[key] = re.sub(r"([MLCz]) ", r"\1", " ".join(found[key].split()))
    if style := found.get("style"):
        kept = [part for part in style.split("; ") if not part.startswith(("font", "stroke-linecap: square"))]
        found["style"] = "; ".join(kept)
    return found


def _interval_text(row: Interval) -> str:
    if not math.isfinite(row.value):
        return "–"
    known = math.isfinite(row.low) and math.isfinite(row.high)
    return number(row.value) + (f" ({number(row.low)} to {number(row.high)})" if known else "")
