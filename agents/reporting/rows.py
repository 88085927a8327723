"""Charts of rows, a name above each: intervals, and shares of a whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from diffusion_gym.agents.reporting.charts import Axis
from diffusion_gym.agents.reporting.drawing import Drawing, Key
from diffusion_gym.agents.reporting.markup import Html, element, join
from diffusion_gym.agents.reporting.results import number, percent

_ROW: Final = 46  # pixels
_NAME: Final = 15
_LINE: Final = 29
_BAR: Final = 18


@dataclass(frozen=True)
class Interval:
    """A row: a value, and the ends of its interval, NaN for none.

    Attributes:
        name: of the row.
        value: the value.
        low: lower end.
        high: upper end.
        color: classes of the page's style.
    """

    name: str
    value: float
    low: float
    high: float
    color: str = "first"

    def ends(self) -> list[float]:
        """What the axis must hold."""
        return [value for value in (self.value, self.low, self.high) if math.isfinite(value)]


@dataclass(frozen=True)
class IntervalChart(Drawing):
    """A value and its interval in each row.

    Attributes:
        title: what the chart shows.
        label: name and unit of the values.
        rows: from top to bottom.
        marks: values to compare with, as dashed lines.
    """

    title: str
    label: str
    rows: Sequence[Interval]
    marks: Sequence[float] = ()
    kind: ClassVar[str] = "chart rows"
    left: ClassVar[int] = 24

    @property
    def height(self) -> int:  # type: ignore[override]
        """A strip for each row."""
        return _ROW * len(self.rows)

    def plot(self) -> Html:
        """Ticks, names, intervals and values."""
        values = [end for row in self.rows for end in row.ends()]
        if not values:
            return Html()
        across = Axis.covering([*values, *self.marks], 4, rounded=True)
        lines = [self._tick(across, tick) for tick in across.ticks]
        for mark in self.marks:
            x = f"{across.percent(mark)}%"
            lines.append(element("line", x1=x, x2=x, y1=0, y2="100%", class_="mark"))
        return join([*lines, *(self._row(across, index, row) for index, row in enumerate(self.rows))])

    def spoken(self) -> str:
        """Each row in words."""
        return f"{self.title}: " + ", ".join(f"{row.name} {_told(row)}" for row in self.rows) + "."

    @staticmethod
    def _tick(across: Axis, tick: float) -> Html:
        x = f"{across.percent(tick)}%"
        line = element("line", x1=x, x2=x, y1=0, y2="100%", class_="grid")
        return join([line, element("text", across.text(tick), x=x, y="100%", dy="1.5em", text_anchor="middle")])

    @staticmethod
    def _row(across: Axis, index: int, row: Interval) -> Html:
        top = index * _ROW
        parts = [
            element("text", row.name, x=0, dx=".4em", y=top + _NAME, class_="name"),
            element("text", _told(row), x="100%", y=top + _NAME, text_anchor="end"),
        ]
        y = top + _LINE
        if math.isfinite(row.low) and math.isfinite(row.high):
            ends = {"x1": f"{across.percent(row.low)}%", "x2": f"{across.percent(row.high)}%"}
            parts.append(element("line", y1=y, y2=y, class_="interval", **ends))
        if math.isfinite(row.value):
            parts.append(element("circle", cx=f"{across.percent(row.value)}%", cy=y, r=5))
        return element("g", *parts, class_=f"{row.color} whole")


@dataclass(frozen=True)
class ShareChart(Drawing):
    """A whole in each row, divided among categories, from faint to strong.

    Attributes:
        title: what the chart shows.
        label: of what the shares are.
        categories: in the order of the shares.
        rows: name and shares, from top to bottom.
        strong_first: whether the first category is the strongest; its share is written out, else the last one's.
    """

    title: str
    label: str
    categories: Sequence[str]
    rows: Sequence[tuple[str, Sequence[float]]]
    strong_first: bool = False
    kind: ClassVar[str] = "chart rows"
    left: ClassVar[int] = 24

    @property
    def height(self) -> int:  # type: ignore[override]
        """A strip for each row."""
        return _ROW * len(self.rows)

    @property
    def keys(self) -> Sequence[Key]:
        """A key for each category."""
        return [
            Key(name, "first", element("rect", width=26, height=10, opacity=self._opacity(index)))
            for index, name in enumerate(self.categories)
        ]

    def plot(self) -> Html:
        """Names and bars."""
        ticks = [
            element("text", f"{tick} %", x=f"{tick}%", y="100%", dy="1.2em", text_anchor="middle")
            for tick in (0, 25, 50, 75, 100)
        ]
        return join([*(self._row(index, name, shares) for index, (name, shares) in enumerate(self.rows)), *ticks])

    def spoken(self) -> str:
        """Each row in words."""
        rows = (
            f"{name} "
            + ", ".join(f"{kind} {percent(share)}" for kind, share in zip(self.categories, shares, strict=True))
            for name, shares in self.rows
        )
        return f"{self.title}: {'; '.join(rows)}."

    def _opacity(self, index: int) -> float:
        share = index / max(1, len(self.categories) - 1)
        return round(0.15 + 0.85 * (1 - share if self.strong_first else share), 3)

    def _row(self, index: int, name: str, shares: Sequence[float]) -> Html:
        top, left, parts = index * _ROW, 0.0, [element("text", name, x=0, y=index * _ROW + _NAME, class_="name")]
        for place, (kind, share) in enumerate(zip(self.categories, shares, strict=True)):
            if not math.isfinite(share):
                continue
            bounds = {"x": f"{100 * left:.3f}%", "width": f"{100 * share:.3f}%", "y": top + _NAME + 6, "height": _BAR}
            hint = element("title", f"{name}: {kind} {percent(share)}")
            parts.append(element("rect", hint, opacity=self._opacity(place), **bounds))
            left += share
        told = 0 if self.strong_first else -1
        parts.append(
            element(
                "text", f"{self.categories[told]} {percent(shares[told])}", x="100%", y=top + _NAME, text_anchor="end"
            )
        )
        return element("g", *parts, class_="first")


def _told(row: Interval) -> str:
    if not math.isfinite(row.value):
        return "–"
    both = f" ({number(row.low)} to {number(row.high)})" if math.isfinite(row.low) and math.isfinite(row.high) else ""
    return f"{number(row.value)}{both}"
