"""A chart of a page that is also a file of its own: the same drawing, one in the page's style, one with its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import ClassVar, Final

from diffusion_gym.agents.reporting.markup import STYLE, Html, element, join

_WIDTH: Final = 760  # pixels of a file
_RIGHT: Final = 24
_BELOW: Final = 60
_KEY: Final = 34  # the line of a legend's entry
_LETTER: Final = 7.2  # about the width of a letter of a legend


@dataclass(frozen=True)
class Key:
    """An entry of a legend.

    Attributes:
        name: what it explains.
        kind: the classes of the page's style that colour it.
        sample: what stands before the name: SVG, 26 by 10 pixels.
    """

    name: str
    kind: str
    sample: Html = Html('<path d="M2 5H24"></path>')

    def svg(self, **attributes: object) -> Html:
        """The sample as an `svg` element."""
        return element("svg", self.sample, height=10, class_=self.kind, **attributes)


class Drawing(ABC):
    """What a chart has in common with others.

    Attributes:
        title: what it shows.
        label: name and unit of its values.
        height: of the plot in pixels; its width is the page's.
    """

    title: str
    label: str
    height: int
    kind: ClassVar[str] = "chart"  # classes of the page's style
    left: ClassVar[int] = 70  # pixels beside the plot of a file, where the labels of the y axis stand

    @abstractmethod
    def plot(self) -> Html:
        """What is inside the plot, in percent of its width; empty where there is nothing to draw."""

    @abstractmethod
    def spoken(self) -> str:
        """The chart in a sentence, for those who cannot see it."""

    @property
    def keys(self) -> Sequence[Key]:
        """The legend."""
        return ()

    def figure(self, *below: object, legend: bool = True) -> Html:
        """The chart within a page.

        Args:
            below: what comes under it.
            legend: whether it has its legend; false where one legend stands for several charts.
        """
        title, plot = element("p", self.title, class_="title"), self.plot()
        if not plot:
            return element("figure", title, element("figcaption", "No finite value."))
        above = [title, element("p", self.label, class_="legend")] if self.label else [title]
        if legend and self.keys:
            above.append(legend_of(self.keys))
        drawing = element("svg", plot, height=self.height, role="img", aria_label=self.spoken())
        return element("figure", *above, drawing, *below, class_=self.kind)

    def file(self) -> str:
        """The chart as an SVG document, in light or dark as the viewer prefers."""
        legend, top = _legend_in_file(self.keys)
        parts = [
            element("style", Html(STYLE)),
            element("rect", width="100%", height="100%", style="fill: var(--page)"),
            element("text", self.title, x=16, y=26, style="font-weight: 600; fill: var(--text)"),
            element("text", self.label, x=16, y=46, style="font-size: 13px; fill: var(--muted)"),
            legend,
        ]
        inside = {"width": _WIDTH - self.left - _RIGHT, "height": self.height, "x": self.left, "y": top}
        parts.append(element("g", element("svg", self.plot(), overflow="visible", **inside)))
        height = top + self.height + _BELOW
        head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        head += f'viewBox="0 0 {_WIDTH} {height}" font-family="system-ui, sans-serif" font-size="16" role="img" '
        return f'{head}aria-label="{escape(self.spoken())}"><g class="chart">{join(parts)}</g></svg>\n'


def legend_of(keys: Sequence[Key]) -> Html:
    """A legend within a page."""
    return element("ul", *(element("li", key.svg(aria_hidden="true"), key.name) for key in keys), class_="legend")


def _legend_in_file(keys: Sequence[Key]) -> tuple[Html, int]:
    """The legend in lines that fit, and where the plot may begin."""
    left, top, parts = 16.0, 68, []
    for key in keys:
        width = _KEY + _LETTER * len(key.name) + 18
        if left > 16 and left + width > _WIDTH - 16:
            left, top = 16.0, top + 20
        sample = key.svg(x=left, y=top - 9, width=26)
        name = element("text", key.name, x=left + _KEY, y=top, style="font-size: 13px; fill: var(--muted)")
        parts.append(join([sample, name]))
        left += width
    return join(parts), top + 24 if keys else 68
