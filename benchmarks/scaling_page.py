"""What the records of scaling.py say: exponents, and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from diffusion_gym.agents.report.marked import markdown_table

LINEAR: Final = 1.1  # an exponent up to here counts as linear; the rest is the noise of four values
MICRO_BATCH: Final = "micro-batch"  # the axis without a law

Record = Mapping[str, Any]

_AXES: Final = {
    "batch": ("Batch", "trajectories at once"),
    "steps": ("Denoising steps", "T"),
    "latents": ("Latents", "positions"),
    "prompts": ("Distinct prompts", "prompts in the set"),
    MICRO_BATCH: ("Micro-batch", "transitions in one pass"),
}
_OWN: Final = {
    "rollout": "rollout, s",
    "update": "update, s",
    "rollout_memory": "memory of the rollout, MB",
    "memory": "memory of both, MB",
}
_BARE: Final = {"bare_rollout": "bare UNet for the rollout, s", "bare_update": "bare UNet for the update, s"}


def numbers(record: Record) -> dict[str, float]:
    """Seconds of the faster measured iteration, CPU seconds on a CPU; memory in MB beyond what was loaded, at least 1.

    `rollout_memory` is the peak of the first rollout, `memory` that of everything. The bare UNet's seconds are there
    where they were measured.
    """
    kind, memory = ("_cpu_s", "rss_mb") if record["workload"]["device"] == "cpu" else ("_s", "cuda_mb")
    loaded = record[f"loaded_{memory}"]
    found = {name: min(row[name + kind] for row in record["iterations"]) for name in ("rollout", "update")}
    found["rollout_memory"] = max(1.0, record[f"rollout_peak_{memory}"] - loaded)
    found["memory"] = max(1.0, record[f"peak_{memory}"] - loaded)
    for name in ("rollout", "update") if record["bare"] else ():
        found[f"bare_{name}"] = min(row[name + kind] for row in record["bare"])
    return found


def power_law(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """The p of `value = c size^p`, by least squares in the logarithms, and the largest |value / fit - 1|.

    Raises:
        ValueError: fewer than two sizes, or a number that is not positive.
    """
    if len(set(sizes)) < 2 or min(*sizes, *values) <= 0:
        raise ValueError(f"sizes={list(sizes)}, values={list(values)} must be positive, and of two sizes or more")
    x, y = np.log(sizes), np.log(values)
    exponent, constant = np.polyfit(x, y, 1)
    return float(exponent), float(np.abs(np.exp(y - constant - exponent * x) - 1).max())


def tables(records: Sequence[Record]) -> str:
    """A table for each device and axis, with the exponents in its last lines, and the settings."""
    parts = []
    for device in sorted({record["workload"]["device"] for record in records}):
        own = [record for record in records if record["workload"]["device"] == device]
        for axis, (title, _) in _AXES.items():
            chosen = sorted((record for record in own if record["axis"] == axis), key=_order)
            if chosen:
                table = _passes(chosen) if axis == MICRO_BATCH else _growth(axis, chosen)
                parts += [f"### {title}, {device.upper()}", table, _setting(axis, chosen)]
        parts.append(_machine(own[0]))
    return "\n\n".join(parts)


def _order(record: Record) -> tuple[int, int]:
    return record["setting"]["side"] if record["axis"] == MICRO_BATCH else 0, record["size"]


def _growth(axis: str, records: Sequence[Record]) -> str:
    sizes, rows = [record["size"] for record in records], [numbers(record) for record in records]
    columns = {name: title for name, title in {**_OWN, **_BARE}.items() if all(name in row for row in rows)}
    head = [_AXES[axis][1], *columns.values()]
    lines = [[f"{size:,}", *(_rounded(row[name]) for name in columns)] for size, row in zip(sizes, rows, strict=True)]
    if len(sizes) < 2:
        return markdown_table(head, lines, "---:")
    fits = {name: power_law(sizes, [row[name] for row in rows]) for name in columns}
    ends = {name: power_law(sizes[-2:], [row[name] for row in rows[-2:]])[0] for name in columns}
    lines.append(["**exponent**", *(f"**{power:.2f}**" for power, _ in fits.values())])
    lines.append(["of the last two", *(f"{power:.2f}" for power in ends.values())])
    lines.append(["farthest from the fit", *(f"{off:.0%}" for _, off in fits.values())])
    return (
        f"{markdown_table(head, lines, '---:')}\n\n{_verdict({name: power for name, (power, _) in fits.items()}, ends)}"
    )


def _verdict(fits: Mapping[str, float], ends: Mapping[str, float]) -> str:
    """Which of our own columns are at most linear: over all sizes, and between the last two, where that differs."""
    over = [name for name in _OWN if fits[name] > LINEAR]
    late = [name for name in _OWN if ends[name] > LINEAR and name not in over]
    linear = f"At most linear: no exponent is above {LINEAR}."
    said = [f"More than linear: {_exponents(over, fits)}." if over else linear]
    if late:
        said.append(f"Between the last two sizes more than linear: {_exponents(late, ends)}.")
    return " ".join(said)


def _exponents(names: Sequence[str], of: Mapping[str, float]) -> str:
    """The columns with their exponents, and the bare UNet's beside ours."""
    parts = []
    for name in names:
        bare = f"; the bare UNet's {of[f'bare_{name}']:.2f}" if f"bare_{name}" in of else ""
        parts.append(f"{_OWN[name].partition(',')[0]} ({of[name]:.2f}{bare})")
    return ", ".join(parts)


def _passes(records: Sequence[Record]) -> str:
    """What a transition's training costs against the latent positions of one pass."""
    head = ["latents", "transitions in one pass", "positions in one pass", "update, ms a transition", "memory, MB"]
    lines = []
    for record in records:
        setting, found = record["setting"], numbers(record)
        side, transitions = setting["side"], setting["batch"] * setting["steps"]
        cells = [f"{side}x{side}", str(record["size"]), f"{record['size'] * side**2:,}"]
        cost = _rounded(1000 * found["update"] / transitions)
        lines.append([*cells, cost, _rounded(found["memory"])])
    return markdown_table(head, lines, "---:")


def _setting(axis: str, records: Sequence[Record]) -> str:
    """What did not change along an axis."""
    names = {
        "batch": "{} trajectories",
        "steps": "T = {}",
        "side": "latents of {0}x{0}",
        "prompts": "{} prompts",
        "micro_batch": "{} transitions in one pass",
    }
    settings = [record["setting"] for record in records]
    same = [text.format(settings[0][key]) for key, text in names.items() if len({s[key] for s in settings}) == 1]
    return f"With {', '.join(same)}."


def _machine(record: Record) -> str:
    work = record["workload"]
    where = record["card"] or f"a CPU, threads: {work['threads']}"
    return (
        f"On {where}: {record['trained_parameters']:,} trained parameters, precision `{work['precision']}`, "
        f"{work['warmup']} iteration to warm up and the faster of {work['epochs']} measured ones; torch "
        f"{record['versions']['torch']}, diffusers {record['versions']['diffusers']}."
    )


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
