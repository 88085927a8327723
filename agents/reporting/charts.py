"""Line charts as inline SVG: they follow the page's width and colours, and need no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from diffusion_gym.agents.reporting.markup import Html, element, join

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Curve:
    """Points, and their running mean as a line.

    Attributes:
        name: what the legend calls it.
        x: where the points are.
        y: their values; those that are not finite are left out.
        color: `first` or `second` of the page's style.
        level: a value to compare with, as a dashed horizontal line.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: str = "first"
    level: float | None = None

    def points(self) -> list[tuple[float, float]]:
        """The finite points."""
        return [(x, y) for x, y in zip(self.x, self.y, strict=True) if math.isfinite(y)]


@dataclass(frozen=True)
class Axis:
    """A range of values, its ticks, and the power of ten that the labels leave out."""

    low: float
    high: float
    ticks: tuple[float, ...]
    step: float
    exponent: int

    @classmethod
    def covering(cls, values: Sequence[float], number: int, *, rounded: bool) -> Axis:
        """An axis of about `number` ticks over `values`, which begins and ends at a tick if it is `rounded`."""
        low, high = min(values), max(values)
        if high - low <= 1e-9 * max(abs(low), abs(high)):  # flat, but for rounding errors: seen from zero
            low, high = min(low, 0.0), max(high, 0.0) if low else 1.0
        step = _round_step((high - low) / number)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        largest = max(abs(low), abs(high))
        exponent = 0 if 0.01 <= largest < 1e6 else 3 * math.floor(math.log10(largest) / 3)
        if rounded:
            low, high = first * step, last * step
        ticks = [index * step for index in range(first, last + 1)]
        inside = (tick for tick in ticks if low - step * 1e-6 <= tick <= high + step * 1e-6)
        return cls(low, high, tuple(inside), step, exponent)

    def percent(self, value: float) -> float:
        """Where `value` lies between the two ends, in percent."""
        return round(100 * (value - self.low) / (self.high - self.low), 3)

    def text(self, tick: float) -> str:
        """The label of a tick."""
        step = self.step / 10**self.exponent
        decimals = next(places for places in range(16) if abs(round(step, places) - step) < step * 1e-6)
        return f"{tick / 10**self.exponent:,.{decimals}f}".replace("-", "−")

    @property
    def unit(self) -> str:
        """What the labels of the ticks are to be multiplied with."""
        return f" (×10{str(self.exponent).translate(_SUPERSCRIPTS)})" if self.exponent else ""


def line_chart(title: str, x_label: str, y_label: str, curves: Sequence[Curve], *, height: int, zero: bool) -> Html:
    """A figure with curves over one x axis.

    Args:
        title: what the chart shows.
        x_label: name and unit of the x axis, which begins at 0.
        y_label: name and unit of the y axis.
        curves: what to draw; a legend names them, and the dashed levels, if there is more than one line.
        height: of the plot, in pixels; its width is the page's.
        zero: whether the y axis includes 0.
    """
    points = [point for curve in curves for point in curve.points()]
    if not points:
        return element("figure", element("p", title, class_="title"), element("figcaption", "No finite value."))
    levels = [curve.level for curve in curves if curve.level is not None]
    across = Axis.covering([0.0, *(x for x, _ in points)], 4, rounded=False)
    up = Axis.covering([*(y for _, y in points), *levels, *([0.0] if zero else [])], 4, rounded=True)
    first, last = points[0], points[-1]
    spoken = f"{title}: {y_label} from {first[1]:.4g} at {first[0]:g} to {last[1]:.4g} at {last[0]:g} {x_label}."
    drawing = element(
        "svg",
        _frame(across, up),
        element("text", x_label + across.unit, x="50%", y="100%", dy="2.9em", text_anchor="middle"),
        *(_draw(curve, across, up) for curve in curves),
        height=height,
        role="img",
        aria_label=spoken,
    )
    names = [element("p", title, class_="title"), element("p", y_label + up.unit, class_="legend")]
    legend = [_legend(curves)] if len(curves) > 1 or levels else []
    return element("figure", *names, *legend, drawing, class_="chart")


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and the up to `window - 1` values before it."""
    parts = [values[max(0, end - window) : end] for end in range(1, len(values) + 1)]
    return [sum(part) / len(part) for part in parts]


def window_for(number: int) -> int:
    """How many of `number` values a running mean takes together."""
    return max(1, min(20, number // 8))


def _frame(across: Axis, up: Axis) -> Html:
    """Horizontal grid lines, and the labels of both axes' ticks."""
    parts: list[Html] = []
    for tick in up.ticks:
        y = f"{100 - up.percent(tick)}%"
        parts.append(element("line", x1=0, x2="100%", y1=y, y2=y, class_="grid"))
        parts.append(element("text", up.text(tick), x=0, dx="-.7em", y=y, dy=".35em", text_anchor="end"))
    for tick in across.ticks:
        x = f"{across.percent(tick)}%"
        parts.append(element("text", across.text(tick), x=x, y="100%", dy="1.5em", text_anchor="middle"))
    return join(parts)


def _draw(curve: Curve, across: Axis, up: Axis) -> Html:
    points = curve.points()
    places = [(across.percent(x), 100 - up.percent(y)) for x, y in points]
    parts = [
        element("circle", element("title", f"{x:,g}: {y:.4g}"), cx=f"{left}%", cy=f"{top}%", r=3)
        for (x, y), (left, top) in zip(points, places, strict=True)
    ]
    if curve.level is not None:
        y = f"{100 - up.percent(curve.level)}%"
        parts.append(element("line", x1=0, x2="100%", y1=y, y2=y, class_="level"))
    smooth = running_mean([top for _, top in places], window_for(len(places)))
    line = "M" + " ".join(f"{left} {top:.3f}" for (left, _), top in zip(places, smooth, strict=True))
    # Stretched to the plot, whose width is known to the browser only; the line keeps its thickness.
    path = element("path", d=line, vector_effect="non-scaling-stroke")
    parts.append(element("svg", path, viewBox="0 0 100 100", preserveAspectRatio="none", width="100%", height="100%"))
    return element("g", *parts, class_=curve.color)


def _legend(curves: Sequence[Curve]) -> Html:
    items: list[Html] = []
    for curve in curves:
        line = element("path", d="M2 5H24")
        items.append(element("li", _key(line, curve.color), curve.name))
    if leveled := [curve for curve in curves if curve.level is not None]:
        line = element("line", x1=0, x2="100%", y1=5, y2=5, class_="level")
        items.append(element("li", *(_key(line, curve.color) for curve in leveled), "pretrained model"))
    return element("ul", *items, class_="legend")


def _key(line: Html, color: str) -> Html:
    return element("svg", line, height=10, class_=color, aria_hidden="true")


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 2.5 and 5 times a power of ten that is at least `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least * (1 - 1e-9))
