"""Line charts as inline SVG: they follow the page's width and colours, and need no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from diffusion_gym.agents.reporting.drawing import Drawing, Key
from diffusion_gym.agents.reporting.markup import Html, element, join

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Curve:
    """Points, and their running mean as a line.

    Attributes:
        name: what the legend calls it.
        x: where the points are.
        y: their values; points of which either is not finite are left out.
        color: classes of the page's style: `first`, `second`, or `series-1` to `series-8`, also `dashed`.
        level: a value to compare with, as a dashed horizontal line.
        band: lower and upper end of an interval at each point; empty for none.
        smooth: whether the line is the running mean, or goes through the points.
        dots: whether the points are drawn.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: str = "first"
    level: float | None = None
    band: Sequence[tuple[float, float]] = ()
    smooth: bool = True
    dots: bool = True

    def points(self) -> list[tuple[float, float]]:
        """The finite points."""
        return [(x, y) for x, y in zip(self.x, self.y, strict=True) if math.isfinite(x) and math.isfinite(y)]

    def ends(self) -> list[tuple[float, float, float]]:
        """Where the band is, and its lower and upper end; without those that are not finite."""
        rows = [(x, *ends) for x, ends in zip(self.x, self.band, strict=True)] if self.band else []
        return [row for row in rows if all(map(math.isfinite, row))]


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


@dataclass(frozen=True)
class LineChart(Drawing):
    """Curves over one x axis.

    Attributes:
        title: what the chart shows.
        x_label: name and unit of the x axis.
        y_label: name and unit of the y axis.
        curves: what to draw; a legend names them, and the dashed levels, if there is more than one line.
        height: of the plot, in pixels; its width is the page's.
        zero: whether the y axis includes 0.
        from_zero: whether the x axis begins at 0.
    """

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    height: int = 300
    zero: bool = False
    from_zero: bool = True

    @property
    def label(self) -> str:  # type: ignore[override]
        """The y axis, with the power of ten that its labels leave out."""
        return self.y_label + (self._up().unit if self._points() else "")

    @property
    def keys(self) -> list[Key]:
        """A key for each curve, and one for the levels."""
        leveled = [curve.color for curve in self.curves if curve.level is not None]
        if len(self.curves) < 2 and not leveled:
            return []
        line = element("line", x1=0, x2="100%", y1=5, y2=5, class_="level")
        named = [Key(curve.name, curve.color) for curve in self.curves]
        return [*named, *(Key("" if color != leveled[-1] else "pretrained model", color, line) for color in leveled)]

    def plot(self) -> Html:
        """Grid, labels and curves."""
        if not self._points():
            return Html()
        beginning = [0.0] if self.from_zero else []
        values = [*beginning, *(x for x, _ in self._points())]
        across = Axis.covering(values, 4 if self.from_zero else 6, rounded=not self.from_zero)
        up = self._up()
        name = element("text", self.x_label + across.unit, x="50%", y="100%", dy="2.9em", text_anchor="middle")
        return join([_frame(across, up), name, *(_draw(curve, across, up) for curve in self.curves)])

    def spoken(self) -> str:
        """First and last point of the first curve."""
        if not self._points():
            return f"{self.title}: no finite value."
        first, last = self._points()[0], self._points()[-1]
        ends = f"from {first[1]:.4g} at {first[0]:g} to {last[1]:.4g} at {last[0]:g}"
        return f"{self.title}: {self.y_label} {ends} {self.x_label}."

    def _points(self) -> list[tuple[float, float]]:
        return [point for curve in self.curves for point in curve.points()]

    def _up(self) -> Axis:
        values = [y for _, y in self._points()]
        values += [end for curve in self.curves for _, *ends in curve.ends() for end in ends]
        values += [curve.level for curve in self.curves if curve.level is not None]
        return Axis.covering([*values, *([0.0] if self.zero else [])], 4, rounded=True)


def line_chart(title: str, x_label: str, y_label: str, curves: Sequence[Curve], *, height: int, zero: bool) -> Html:
    """A `LineChart` within a page."""
    return LineChart(title, x_label, y_label, curves, height, zero).figure()


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
        if curve.dots
    ]
    if curve.level is not None:
        y = f"{100 - up.percent(curve.level)}%"
        parts.append(element("line", x1=0, x2="100%", y1=y, y2=y, class_="level"))
    window = window_for(len(places)) if curve.smooth else 1
    smooth = running_mean([top for _, top in places], window)
    line = "M" + " ".join(f"{left} {top:.3f}" for (left, _), top in zip(places, smooth, strict=True))
    # Stretched to the plot, whose width is known to the browser only; the line keeps its thickness.
    paths = [element("path", d=line, vector_effect="non-scaling-stroke")] if places else []
    if ends := curve.ends():
        lower = [f"{across.percent(x)} {100 - up.percent(low):.3f}" for x, low, _ in ends]
        upper = [f"{across.percent(x)} {100 - up.percent(high):.3f}" for x, _, high in reversed(ends)]
        paths.insert(0, element("path", d=f"M{' '.join(lower + upper)}Z", class_="band"))
    parts.append(element("svg", *paths, viewBox="0 0 100 100", preserveAspectRatio="none", width="100%", height="100%"))
    return element("g", *parts, class_=curve.color)


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 2.5 and 5 times a power of ten that is at least `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least * (1 - 1e-9))
