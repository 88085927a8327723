"""The presets as text, side by side, and as JSON: what `diffusion-gym presets` prints."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

from diffusion_gym.agents.algorithms import AGENTS
from diffusion_gym.agents.training.presets import PRESETS
from diffusion_gym.agents.training.settings import RunSettings, starting_point
from diffusion_gym.storage import json_text

_WIDTH: Final = 120  # where the output is no terminal
_LONG_NAME: Final = 12  # a longer name is broken at its hyphens
_UNITS: Final = {"kl_weight": "per nat"}
_LEGEND: Final = (
    "(value): not set by the preset; the default stands. (env's): left to the environment and its model. "
    "kl_weight is in advantages a nat of each step's divergence, summed over the dimensions. Any preset "
    "goes with any agent: one that has no column here gives the values that its agents have in common."
)


@dataclass(frozen=True)
class _Column:
    """Presets that set the same, and a cell for each row."""

    head: list[str]
    cells: tuple[str, ...]

    @property
    def width(self) -> int:
        return max(map(len, (*self.head, *self.cells)))


@dataclass(frozen=True)
class PresetsOptions:
    """Print the hyperparameter presets side by side, with their sources."""

    agent: str | None = None
    """Only the values for this agent."""
    json: bool = False
    """Print one JSON object and nothing else: each preset's values for every agent."""


def print_presets(options: PresetsOptions) -> None:
    """Print the presets as the options say.

    Raises:
        ValueError: an unknown agent.
    """
    agents = AGENTS.names() if options.agent is None else [options.agent]
    if options.json:
        print(json_text(presets_json(agents)))
    else:
        print(presets_text(agents, shutil.get_terminal_size((_WIDTH, 24)).columns))


def presets_json(agents: Sequence[str]) -> dict[str, Any]:
    """By preset: its source, what the source leaves open, and by agent the values that the preset sets."""
    return {
        name: {
            "source": preset.source,
            "choices": preset.choices,
            "agents": {agent: dict(_set_values(starting_point("", agent, name, None))) for agent in agents},
        }
        for name, preset in PRESETS.items()
    }


def presets_text(agents: Sequence[str], width: int = _WIDTH) -> str:
    """For each agent a table of the presets that speak of it, then the sources.

    Args:
        agents: names of agents.
        width: longest line; a table that is wider goes on below.

    Raises:
        ValueError: an unknown agent.
    """
    parts = [line for agent in agents for line in _agent_tables(agent, width)]
    for name, preset in PRESETS.items():
        text = f"{name}: {preset.source}. {preset.choices}"
        parts += textwrap.wrap(text, width, subsequent_indent="  ", break_on_hyphens=False)  # paths stay whole
    return "\n".join([*parts, "", *textwrap.wrap(_LEGEND, width)])


def _agent_tables(agent: str, width: int) -> Iterator[str]:
    """The lines of an agent's tables; an agent that no preset names sees all of them."""
    names = [name for name, preset in PRESETS.items() if not preset.agents or agent in preset.agents]
    names = names or list(PRESETS)
    settings = {name: starting_point("", agent, name, None) for name in names}
    rows = _rows(list(settings.values()))
    same: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        same.setdefault(_cells(settings[name], rows), []).append(name)
    columns = [
        _Column(textwrap.wrap(", ".join(heads), _LONG_NAME, break_long_words=False), cells)
        for cells, heads in same.items()
    ]
    label = max(len(_label(key)) for key in rows)
    yield from (agent, "=" * len(agent))
    while columns:
        number = _fitting(columns, width - label)
        yield from _lines(columns[:number], rows, label)
        columns = columns[number:]
        yield ""


def _fitting(columns: list[_Column], width: int) -> int:
    """How many of the columns fit, but at least one."""
    total = 0
    for number, column in enumerate(columns):
        total += 2 + column.width
        if total > width:
            return max(1, number)
    return len(columns)


def _lines(columns: list[_Column], rows: dict[str, str], label: int) -> Iterator[str]:
    """A table: the presets' names, then the options, by how the command line spells them."""

    def line(first: str, cells: Sequence[str]) -> str:
        aligned = (f"  {cell:>{column.width}}" for cell, column in zip(cells, columns, strict=True))
        return (f"{first:{label}}" + "".join(aligned)).rstrip()

    height = max(len(column.head) for column in columns)
    for cells in zip(*([""] * (height - len(column.head)) + column.head for column in columns), strict=True):
        yield line("", cells)
    part = None
    for index, (key, title) in enumerate(rows.items()):
        if title != part:
            yield title
            part = title
        yield line(_label(key), [column.cells[index] for column in columns])


def _label(key: str) -> str:
    """An option with its unit, where it has one that its name does not tell."""
    return f"{key} ({_UNITS[key]})" if key in _UNITS else key


def _parts(settings: RunSettings) -> Iterator[tuple[str, Any]]:
    """The objects that hold a run's options, each with how the command line spells them."""
    yield from (("--", settings), ("--env.", settings.env_options), ("--agent.", settings.agent_options))


def _set_values(settings: RunSettings) -> Iterator[tuple[str, Any]]:
    """The options that the settings' preset sets for their agent."""
    chosen = PRESETS[str(settings.preset)].of(settings.agent)
    for _, part in _parts(settings):
        for entry in fields(part):
            if entry.name in chosen:
                yield entry.name, getattr(part, entry.name)


def _rows(settings: list[RunSettings]) -> dict[str, str]:
    """The options that any of the presets sets, in the order of the command line, each with its part."""
    chosen = {key for each in settings for key, _ in _set_values(each)}
    return {entry.name: title for title, part in _parts(settings[0]) for entry in fields(part) if entry.name in chosen}


def _cells(settings: RunSettings, rows: dict[str, str]) -> tuple[str, ...]:
    set_here = dict(_set_values(settings))
    values = {entry.name: getattr(part, entry.name) for _, part in _parts(settings) for entry in fields(part)}
    return tuple(_text(values[key]) if key in set_here else f"({_text(values[key])})" for key in rows)


def _text(value: object) -> str:
    if value is None:
        return "env's"
    if isinstance(value, tuple):
        return " ".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
