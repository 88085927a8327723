"""The files of a page's figures: each picture or drawing, and its data as CSV, in the benchmark's `figures/`."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_gym.agents.benchmark.records import file_name as agent_name
from diffusion_gym.agents.report.charts import Chart
from diffusion_gym.agents.report.render import render
from diffusion_gym.agents.training.folders import check_name
from diffusion_gym.storage import write_bytes, write_text

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Figure:
    """A chart, and the names of its files."""

    chart: Chart
    files: tuple[str, ...]


class Figures:
    """Writes the files of one page.

    Args:
        folder: the benchmark's folder, where the page is.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "figures"

    def chart(self, name: str, chart: Chart, rows: Rows) -> Figure:
        """A chart, also as `name.svg`, in light or dark as its viewer prefers, and `name.csv`."""
        name = file_name(name)
        write_text(self._folder / f"{name}.svg", render("chart.svg.j2", chart=chart))
        return Figure(chart, (f"{name}.svg", self.data(name, rows)))

    def picture(self, name: str, data: bytes) -> str:
        """Write `name.png`.

        Returns:
            The file's name.
        """
        name = f"{file_name(name)}.png"
        write_bytes(self._folder / name, data)
        return name

    def data(self, name: str, rows: Rows) -> str:
        """Write `name.csv`, a column for each key of the rows.

        Returns:
            The file's name.
        """
        name = f"{file_name(name)}.csv"
        text = io.StringIO()
        table = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        write_text(self._folder / name, text.getvalue())
        return name


def file_name(name: str) -> str:
    """A name that was made of those of agents and tasks, as the run folders write it.

    Raises:
        ValueError: it could name a file elsewhere.
    """
    text = agent_name(name)
    for part in text.split("--"):
        check_name("figure", part)
    return text
