"""The numbers of `eval.json` for people: cards for the means, a table by prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from diffusion_gym.agents.reporting.markup import Html, card, element, join, table
from diffusion_gym.shapes.captions import FAMILIES, parse
from diffusion_gym.storage import number_or_nan


def number(value: float | None, sign: str = "") -> str:
    """A number for people: three decimals, or as many as a large or tiny one needs; `sign="+"` shows a plus.

    A dash is shown for NaN, infinity and None, which is how a file holds them.
    """
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    form = ",.1f" if size >= 100 else ".3f" if size >= 5e-4 or not size else ".4f" if size >= 5e-5 else ".1e"
    return f"{value:{sign if value else ''}{form}}".replace("-", "−")


def percent(value: float | None, sign: str = "") -> str:
    """A share in [0, 1] in percent or, with `sign="+"`, a difference of two in percentage points; see `number`."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{100 * value:{sign if value else ''}.1f}\N{NO-BREAK SPACE}{'pp' if sign else '%'}".replace("-", "−")


@dataclass(frozen=True)
class _Measure:
    key: str
    mean: str
    title: str
    text: Callable[..., str]


_MEASURES: Final = (
    _Measure("reward", "reward_mean", "Reward", number),
    _Measure("success", "success", "Strict success", percent),
)


def result_cards(name: str, part: Mapping[str, Any]) -> list[Html]:
    """A card for each measure of an evaluation: pretrained model, tuned policy, intervals.

    Args:
        name: of the prompts.
        part: the evaluation, or what it has under `held_out`.
    """
    return [_card(f"{measure.title}, {name}", measure, part) for measure in _measures(part)]


def prompt_table(label: str, part: Mapping[str, Any]) -> Html:
    """A row for each prompt and, above those of a family of Shapes captions, one for the family.

    Args:
        label: what a screen reader calls the table.
        part: the evaluation, or what it has under `held_out`.
    """
    measures = _measures(part)
    columns = ("before", "after", "change")
    head: list[str | tuple[str, Sequence[str]]] = ["Prompt", "Samples"]
    head += [(measure.title, columns) for measure in measures]
    groups = [_group(family, rows, measures) for family, rows in by_family(part["prompts"]).items()]
    return table(label, head, groups)


def by_family(rows: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of each family of Shapes captions and last, under the name "", those of any other prompts."""
    families: dict[str, dict[str, Any]] = {name: {} for name in (*FAMILIES, "")}
    for prompt, row in rows.items():
        try:
            families[parse(prompt).family][prompt] = row
        except ValueError:
            families[""][prompt] = row
    return {name: own for name, own in families.items() if own}


def arrow(before: str, after: str) -> Html:
    """Two values, the second one in front."""
    return join([element("span", f"{before} → ", class_="from"), after])


def _measures(part: Mapping[str, Any]) -> list[_Measure]:
    return [measure for measure in _MEASURES if measure.mean in part]


def _card(label: str, measure: _Measure, part: Mapping[str, Any]) -> Html:
    text, base, tuned = measure.text, part[f"base_{measure.mean}"], part[measure.mean]
    low, high = (" to ".join(map(text, part[f"{prefix}{measure.key}_ci95"])) for prefix in ("base_", ""))
    intervals = f"95 % intervals: {low} before, {high} after"
    detail = f"Change {text(_difference(base, tuned), '+')}, {part['samples']:,} samples of each model"
    return card(label, arrow(text(base), text(tuned)), intervals, detail)


def _group(family: str, rows: Mapping[str, Any], measures: Sequence[_Measure]) -> list[tuple[str, list[object]]]:
    lines = [("", _cells(prompt, row, measures)) for prompt, row in rows.items()]
    if not family:
        return lines
    samples = sum(row["samples"] for row in rows.values())
    keys = [f"{prefix}{measure.key}" for measure in measures for prefix in ("", "base_")]
    means = {key: sum(number_or_nan(row[key]) * row["samples"] for row in rows.values()) / samples for key in keys}
    name = f"{family}, {len(rows):,} prompt{'s' if len(rows) > 1 else ''}"
    return [("family", _cells(name, {"samples": samples, **means}, measures)), *lines]


def _cells(name: str, row: Mapping[str, Any], measures: Sequence[_Measure]) -> list[object]:
    cells: list[object] = [name, f"{row['samples']:,}"]
    for measure in measures:
        base, tuned = row[f"base_{measure.key}"], row[measure.key]
        cells += [measure.text(base), measure.text(tuned), measure.text(_difference(base, tuned), "+")]
    return cells


def _difference(stored_before: float | None, stored_after: float | None) -> float:
    before, after = number_or_nan(stored_before), number_or_nan(stored_after)
    return 0.0 if math.isclose(before, after, rel_tol=1e-6) else after - before
