"""Charts by matplotlib as SVG without colours of their own: inks are variables of the page's style, light or dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from diffusion_gym.agents.report.numbers import number, percent, running_mean, window_for

WIDTH: Final = 460  # pixels, about what a phone shows, so that letters stay legible there
_LEFT, _RIGHT, _TOP, _BELOW = 48, 20, 14, 42  # pixels around a plot
_ROW: Final = 46  # pixels of a row of a chart of rows
_MOST_BANDS: Final = 3  # that lie over each other legibly; the intervals of more curves are bars
_MOST_BARS: Final = 8  # of a curve
_SPREAD: Final = 0.3  # of the way between two points, over which the bars of all curves are spread
_BINS: Final = 14  # of the rewards of a density
_STEPS: Final = (1, 2, 2.5, 5, 10)  # between ticks, times a power of ten
_SERIES: Final = tuple(f"series-{index}" for index in range(1, 9))
# matplotlib wants colours; each of these stands for a variable of the style, which replaces it in the SVG.
_INKS: Final = {name: f"#f0a1{index:02x}" for index, name in enumerate((*_SERIES, "muted", "line", "text"))}
_STYLE: Final[dict[str, Any]] = {
    "svg.fonttype": "none",  # text stays text
    "path.simplify": False,  # it would drop strokes of no length, which are dots
    "font.size": 12,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), _INKS["muted"]),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 0),
    **{f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")},
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
    band: Sequence[tuple[float, float]] = ()
    smooth: bool = True
    dots: bool = True

    def points(self) -> list[tuple[float, float]]:
        """The finite points."""
        return [(x, y) for x, y in zip(self.x, self.y, strict=True) if math.isfinite(x) and math.isfinite(y)]

    def rows(self, x: str, y: str) -> list[dict[str, Any]]:
        """The points as rows of a table with the columns `agent`, `x`, `y` and, of a band, `low` and `high`."""
        ends: Sequence[Any] = [{"low": low, "high": high} for low, high in self.band] or [{}] * len(self.x)
        return [{"agent": self.name, x: a, y: b, **band} for a, b, band in zip(self.x, self.y, ends, strict=True)]


@dataclass(frozen=True)
class Interval:
    """A row: a value, and the ends of its interval, NaN for none."""

    name: str
    value: float
    low: float
    high: float
    ink: str = "series-1"

    def __str__(self) -> str:
        if not math.isfinite(self.low) or not math.isfinite(self.high):
            return number(self.value)
        return f"{number(self.value)} ({number(self.low)} to {number(self.high)})"


@dataclass(frozen=True)
class Key:
    """An entry of a legend: its name, its ink, `solid`, `dashed`, `dotted` or `block`, and how strong it is."""

    name: str
    ink: str
    line: str = "solid"
    opacity: float = 1.0


@dataclass(frozen=True)
class Chart:
    """A drawing and what stands around it.

    Attributes:
        title: what it shows.
        label: name and unit of its values.
        spoken: the chart in words, for those who cannot see it.
        svg: the elements of the drawing; empty where there is nothing to draw.
        height: of the drawing in pixels; its width is `WIDTH`.
        keys: the legend.
    """

    title: str
    label: str
    spoken: str
    svg: Markup = Markup()
    height: int = 0
    keys: Sequence[Key] = ()
    width: int = WIDTH


def keys_of(curves: Iterable[Curve]) -> list[Key]:
    """The legend of curves."""
    return [Key(curve.name, curve.ink, "dashed" if curve.dashed else "solid") for curve in curves]


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
        height: of the drawing, in pixels.
        zero: whether the y axis includes 0.
        from_zero: whether the x axis begins at 0.
    """
    points = [point for curve in curves for point in curve.points()]
    if not points:
        return Chart(title, y_label, f"{title}: no finite value.")
    across = [x for x, _ in points]
    whole = all(float(x).is_integer() for x in across)
    with _drawing(title, height, whole=whole) as (axes, svg):
        banded = [curve for curve in curves if curve.band]
        for curve in curves:
            _draw_curve(axes, curve, filled=len(banded) <= _MOST_BANDS)
        if len(banded) > _MOST_BANDS:
            for place, curve in enumerate(banded):
                _draw_bars(axes, curve, place, len(banded))
        if zero:
            axes.set_ylim(bottom=0.0 if min(y for _, y in points) >= 0 else None)
        if from_zero:
            beside = _gap(banded[0]) / 2 if len(banded) > _MOST_BANDS else 0.0
            axes.set_xlim(min(0.0, *across) - beside, (max(*across, 0.0) or 1.0) + beside)
        axes.set_xlabel(x_label)
        axes.grid(visible=False, axis="x")
    first, *_, last = 2 * (curves[0].points() or points)
    spoken = f"from {first[1]:.4g} at {first[0]:g} to {last[1]:.4g} at {last[0]:g}"
    levels = [Key("pretrained model", curve.ink, "dotted") for curve in curves if curve.level is not None]
    keys = [*keys_of(curves), *levels[-1:]] if len(curves) + len(levels) > 1 else []
    return Chart(title, y_label, f"{title}: {y_label} {spoken} {x_label}.", Markup("\n").join(svg), height, keys)


def interval_chart(title: str, label: str, rows: Sequence[Interval]) -> Chart:
    """A value and its interval in each row, and a dotted line at 0."""
    spoken = f"{title}: " + ", ".join(f"{row.name} {row}" for row in rows) + "."
    if not any(math.isfinite(row.value) for row in rows):
        return Chart(title, label, spoken)
    height = _ROW * len(rows) + _BELOW
    with _drawing(title, height, [(row.name, str(row)) for row in rows]) as (axes, svg):
        axes.axvline(0, color=_INKS["muted"], linestyle=":", linewidth=1)
        for index, row in enumerate(rows):
            line = {"color": _INKS[row.ink], "solid_capstyle": "round", "clip_on": False}
            axes.plot([row.low, row.high], [index + 0.15] * 2, linewidth=5, alpha=0.45, **line)
            axes.plot([row.value], [index + 0.15], "o", markersize=9, markeredgewidth=0, **line)
    return Chart(title, label, spoken, Markup("\n").join(svg), height)


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
    height, strength = _ROW * len(rows) + _BELOW, np.linspace(0.15, 1, len(categories))
    strength, said = (strength[::-1], 0) if strong_first else (strength, -1)
    names = [(name, f"{categories[said]} {percent(shares[said])}") for name, shares in rows]
    with _drawing(title, height, names) as (axes, svg):
        for index, (_, shares) in enumerate(rows):
            widths = np.nan_to_num(np.array(shares))
            for left, width, alpha in zip(np.cumsum(widths) - widths, widths, strength, strict=True):
                axes.barh(index + 0.15, width, 0.4, left, color=_INKS["series-1"], alpha=alpha, clip_on=False)
        axes.set_xlim(0, 1)
        axes.set_xticks(ticks := [0, 0.25, 0.5, 0.75, 1], [f"{tick:.0%}" for tick in ticks])
    keys = [Key(name, "series-1", "block", float(alpha)) for name, alpha in zip(categories, strength, strict=True)]
    spoken = "; ".join(
        f"{name} " + ", ".join(f"{kind} {percent(share)}" for kind, share in zip(categories, shares, strict=True))
        for name, shares in rows
    )
    return Chart(title, label, f"{title}: {spoken}.", Markup("\n").join(svg), height, keys)


def density_chart(title: str, points: NDArray[np.float64], mean: Curve, limits: tuple[float, float]) -> Chart:
    """How the rewards of single pictures are spread, measurement by measurement (thesis, figure 5.3).

    Args:
        title: what the chart shows.
        points: reward queries and reward of each picture, `(N, 2)`.
        mean: of the measurements, drawn as a line; the density has its ink.
        limits: of the reward axis.
    """
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    last, columns = float(points[:, 0].max()), max(8, 2 * len(np.unique(points[:, 0])))
    ink, margin = to_rgb(_INKS[mean.ink]), last * (0.5 / columns) if last else 1.0
    fading = LinearSegmentedColormap.from_list("fading", [(*ink, 0.12), (*ink, 1.0)])
    extent = (-margin, last + margin, *limits)
    with _drawing(title, height := 230, whole=True) as (axes, svg):
        options = {"extent": extent, "mincnt": 1, "cmap": fading, "linewidths": 0, "clip_on": False}
        drawn = axes.hexbin(*points.T, gridsize=(columns, _BINS), **options)
        axes.plot(mean.x, mean.y, color=_INKS["text"], linewidth=2, clip_on=False)
        x_half, y_half = (extent[1] - extent[0]) / columns / 2, (limits[1] - limits[0]) / _BINS / 3  # of a hexagon
        x_ends, y_ends = (extent[0] - x_half, extent[1] + x_half), (limits[0] - y_half, limits[1] + y_half)
        axes.set(xlim=x_ends, ylim=y_ends, xlabel="reward queries")
    most = int(drawn.get_array().max())
    label = f"reward of a picture; the strongest colour is {most:,} picture{'s' if most > 1 else ''}"
    return Chart(title, label, f"{title}: density of rewards.", Markup("\n").join(svg), height)


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
    joined = np.stack([before, after, np.full_like(before, np.nan)], 1).reshape(-1, 2)
    with _drawing(title, height := 300) as (axes, svg):
        axes.plot(*joined.T, color=_INKS["muted"], linewidth=0.6, alpha=0.35, clip_on=False)
        _draw_dots(axes, before.tolist(), _INKS["muted"], alpha=0.6)
        _draw_dots(axes, after.tolist(), _INKS[ink], alpha=0.85)
        axes.set(xlim=limits[:, 0], ylim=limits[:, 1], xlabel="first component")
    keys = [Key("pretrained", "muted", "block", 0.6), Key("tuned", ink, "block")]
    return Chart(title, "second component", f"{title}: map of features.", Markup("\n").join(svg), height, keys)


@contextmanager
def _drawing(
    salt: str, height: int, rows: Sequence[tuple[str, str]] = (), *, whole: bool = False
) -> Iterator[tuple[Any, list[Markup]]]:
    """The axes of a figure, and a list that has the elements of its SVG after this context.

    Args:
        salt: of the ids in the SVG, so that those of two charts differ.
        height: in pixels.
        rows: name and value above each row, from top to bottom, in place of a y axis.
        whole: whether the x axis counts.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # without pyplot, which has a state of its own
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    left, stream, svg = _RIGHT if rows else _LEFT, io.StringIO(), list[Markup]()
    place = (left / WIDTH, _BELOW / height, 1 - (left + _RIGHT) / WIDTH, 1 - (_BELOW + _TOP) / height)
    with rc_context(_STYLE | {"svg.hashsalt": salt}):
        figure = Figure(figsize=(WIDTH / 72, height / 72))  # of 72 pixels an inch, as in the SVG
        axes: Any = figure.add_axes(place)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=whole, steps=_STEPS))
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=_STEPS))
        if whole:
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        yield axes, svg
        if rows:
            axes.set_ylim(len(rows) - 0.5, -0.5)
            axes.yaxis.set_visible(False)
        for index, (name, value) in enumerate(rows):
            options = {"transform": axes.get_yaxis_transform(), "parse_math": False}
            axes.text(0, index - 0.2, name, color=_INKS["text"], **options)
            axes.text(1, index - 0.2, value, horizontalalignment="right", **options)
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    for ink, color in _INKS.items():
        text = text.replace(color, f"var(--{ink})")
    parts = (ElementTree.tostring(node, encoding="unicode") for node in _flat(ElementTree.fromstring(text)))
    svg += [Markup(part) for part in parts]


def _ends(curve: Curve) -> list[tuple[float, float, float]]:
    """Where the intervals of a curve are, and their ends."""
    return [(at, *band) for at, band in zip(curve.x, curve.band, strict=False) if all(map(math.isfinite, band))]


def _gap(curve: Curve) -> float:
    """Over how much of the x axis the bars of all curves at one point are spread."""
    return _SPREAD * (max(curve.x) - min(curve.x)) / max(1, len(curve.x) - 1)


def _draw_bars(axes: Any, curve: Curve, place: int, number: int) -> None:
    """Intervals as bars, each curve's a little beside those of the others; of many points some, in turns."""
    ends = _ends(curve)
    every = 1 if len(ends) < 2 * _MOST_BARS else max(number, len(ends) // _MOST_BARS)
    shown = ends[place * every // number :: every] if every > 1 else ends
    beside = 0.0 if every > 1 else _gap(curve) * ((place + 0.5) / number - 0.5)
    at = [x + beside for x, _, _ in shown]
    lines = {"color": _INKS[curve.ink], "linewidth": 1.6, "alpha": 0.75, "clip_on": False}
    axes.vlines(at, [low for _, low, _ in shown], [high for _, _, high in shown], **lines)


def _draw_curve(axes: Any, curve: Curve, *, filled: bool = True) -> None:
    ink, points = _INKS[curve.ink], curve.points()
    x, y = ([point[axis] for point in points] for axis in (0, 1))
    mean = running_mean(y, window_for(len(y)) if curve.smooth else 1)
    if filled and (ends := _ends(curve)):
        axes.fill_between(*zip(*ends, strict=True), color=ink, alpha=0.16, linewidth=0, clip_on=False)
    if curve.level is not None:
        axes.axhline(curve.level, color=ink, linestyle=":", linewidth=1.5, clip_on=False)
    if curve.dots:
        _draw_dots(axes, points, ink, alpha=0.4)
    axes.plot(x, mean, color=ink, linestyle="--" if curve.dashed else "-", linewidth=2, clip_on=False)


def _draw_dots(axes: Any, points: Sequence[Sequence[float]], ink: str, *, alpha: float) -> None:
    """Strokes of no length with round ends: one path, where a marker for each point takes four times the bytes."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    if points:
        path = Path(np.repeat(points, 2, axis=0), [Path.MOVETO, Path.LINETO] * len(points))
        axes.add_patch(
            PathPatch(path, color=ink, fill=False, linewidth=5, capstyle="round", alpha=alpha, clip_on=False)
        )
        axes.autoscale_view()


def _flat(node: ElementTree.Element) -> Iterator[ElementTree.Element]:
    """The elements of matplotlib without groups, fonts, metadata, namespaces and digits that nobody sees."""
    for child in node:
        tag = child.tag.rpartition("}")[2]
        if tag == "g":
            yield from _flat(child)
        elif tag not in ("metadata", "style", "clipPath"):
            element = ElementTree.Element(tag, _attributes(child))
            element.text = (child.text or "").strip()
            element.extend(_flat(child))
            if tag != "defs" or len(element):
                yield element


def _attributes(node: ElementTree.Element) -> dict[str, str]:
    attributes = {key.rpartition("}")[2]: value for key, value in node.items() if not value.startswith("rotate(-0 ")}
    attributes.pop("clip-path", None)  # nothing is drawn beyond the axes
    for key in {"d", "x", "y"} & set(attributes):
        rounded = re.sub(r"-?\d+\.\d+", lambda digits: f"{float(digits[0]):.1f}".removesuffix(".0"), attributes[key])
        attributes[key] = re.sub(r"([MLCz]) ", r"\1", " ".join(rounded.split()))
    if style := attributes.get("style"):
        declarations = [part for part in style.split("; ") if not part.startswith(("font", "stroke-linecap: square"))]
        attributes["style"] = "; ".join(declarations)
    return attributes
