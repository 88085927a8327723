"""The files of a page's figures: each picture or drawing, and its data as CSV, in the benchmark's `figures/`."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from diffusion_gym.agents.benchmark.records import file_name as agent_name
from diffusion_gym.agents.folders import check_name
from diffusion_gym.agents.reporting.drawing import Drawing
from diffusion_gym.agents.reporting.markup import Html, element, join
from diffusion_gym.storage import write_bytes, write_text

Rows = Sequence[Mapping[str, Any]]


class Figures:
    """Writes the files of one page.

    Args:
        folder: the benchmark's folder, where the page is.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "figures"

    def chart(self, name: str, drawing: Drawing, rows: Rows, *, legend: bool = True) -> Html:
        """A chart as a figure of the page, and as `name.svg` and `name.csv`."""
        name = file_name(name)
        write_text(self._folder / f"{name}.svg", drawing.file())
        return drawing.figure(self.data(name, rows, f"{name}.svg"), legend=legend)

    def plot(self, name: str, title: str, svg: str, rows: Rows, alt: str) -> Html:
        """A drawing that is SVG already, as a picture of the page, and as `name.svg` and `name.csv`."""
        name = file_name(name)
        write_text(self._folder / f"{name}.svg", svg)
        source = f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
        shown = element("img", src=source, alt=alt)
        links = self.data(name, rows, f"{name}.svg")
        return element("figure", element("p", title, class_="title"), shown, links, class_="chart")

    def picture(self, name: str, data: bytes) -> str:
        """Write `name.png`.

        Returns:
            The file's name, for `links`.
        """
        name = f"{file_name(name)}.png"
        write_bytes(self._folder / name, data)
        return name

    def data(self, name: str, rows: Rows, *others: str) -> Html:
        """Write `name.csv`, a column for each key of the rows, and link it after the `others`."""
        name = f"{file_name(name)}.csv"
        text = io.StringIO()
        table = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        write_text(self._folder / name, text.getvalue())
        return links(*others, name)


def links(*names: str) -> Html:
    """Links to files of the figures, relative to the page."""
    parts: list[object] = []
    for name in names:
        kind = name.rpartition(".")[2].upper()
        parts += [" · " if parts else "", element("a", kind, href=f"figures/{quote(name)}")]
    return element("p", join(parts), class_="files")


def file_name(name: str) -> str:
    """A name that was made of those of agents and tasks, as the run folders write it.

    Raises:
        ValueError: it could name a file elsewhere.
    """
    found = agent_name(name)
    for part in found.split("--"):
        check_name("figure", part)
    return found
