"""What libraries.py writes into docs/libraries.md: the table, and what differs from the native agent."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from diffusion_gym.agents.evaluation import mean_interval
from diffusion_gym.agents.report.marked import markdown_table, write_marked
from diffusion_gym.storage import read_json

Record = Mapping[str, Any]
Groups = Mapping[str, Sequence[Record]]

LABELS: Final = {
    "native": "native DDPO_IS",
    "sb3_ppo": "SB3, its own PPO",
    "sb3_ddpoppo": "SB3, `DDPOPPO`",
    "tianshou_ppo": "Tianshou, its PPO",
}
_SHARED: Final = ("env", "preset", "total_reward_queries", "evaluation_samples", "threads", "settings")


def write_pages(records: Path, page: Path, readme: Path) -> None:
    """Write what stands between the `libraries` markers of two pages anew.

    Args:
        records: folder of the records.
        page: gets `results`.
        readme: gets `headline`.

    Raises:
        ValueError: the records cannot be compared, or a page has no such markers.
    """
    groups = read_groups(records)
    write_marked(page, {"libraries": results(groups)})
    write_marked(readme, {"libraries": headline(groups)})


def read_groups(folder: Path) -> dict[str, list[Record]]:
    """The records by library, in the order of `LABELS`, seeds in order.

    Raises:
        ValueError: there is none, none of the native agent, or they cannot be compared.
    """
    records = [read_json(path) for path in folder.glob("*-seed-*.json")]
    if not any(record["library"] == "native" for record in records):
        raise ValueError(f"{folder} holds no record of native; make them with `python benchmarks/libraries.py run`")
    for record in records[1:]:
        if differing := [key for key in _SHARED if _given(record[key]) != _given(records[0][key])]:
            names = [f"{entry['library']}-seed-{entry['seed']}" for entry in (records[0], record)]
            raise ValueError(f"{' and '.join(names)} cannot be compared: their {', '.join(differing)} differ")
    own = {name: [record for record in records if record["library"] == name] for name in LABELS}
    return {name: sorted(rows, key=lambda record: int(record["seed"])) for name, rows in own.items() if rows}


def _given(value: Any) -> Any:
    """A setting without the options that were left at their defaults: later versions have more of them."""
    if isinstance(value, dict):
        return {key: _given(entry) for key, entry in value.items() if entry is not None}
    return value


def results(groups: Groups) -> str:
    """The Markdown of the results."""
    first = groups["native"][0]
    seeds = sorted({record["seed"] for rows in groups.values() for record in rows})
    command = (
        f"python benchmarks/libraries.py run --libraries {','.join(groups)} --seeds {','.join(map(str, seeds))} "
        f"--preset {first['preset']} --env {first['env']} --total-reward-queries {first['total_reward_queries']}"
    )
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    return "\n\n".join(
        [
            table(groups),
            f"`{first['env']}`, preset `{first['preset']}`, {first['total_reward_queries']:,} reward queries a run, "
            f"{_count(first['threads'], 'CPU thread')} a run, a process a run. Means over seeds, with 95 % intervals "
            f"(Student's). *Reward*: {first['evaluation_samples']} fresh samples of the tuned policy and of the "
            "pretrained model, from the same noise for all libraries. *Last fifth*: mean reward of the last fifth of "
            "the training samples. *Seconds*, *CPU seconds* and *peak memory* are of the training alone, without "
            f"imports and evaluation; *peak memory* is the resident memory of the process, {_baselines(groups)}. "
            f"With {versions}.",
            "\n".join(f"- {sentence}" for sentence in findings(groups)),
            f"    {command}\n    python benchmarks/libraries.py page",
        ]
    )


def headline(groups: Groups) -> str:
    """The table in short."""
    first = groups["native"][0]
    head = [
        "",
        "seeds",
        f"reward after {first['total_reward_queries']:,} queries",
        "CPU seconds",
        "peak memory, MB",
    ]
    rows = []
    for name, own in groups.items():
        costs = (f"{np.mean([record[key] for record in own]):,.0f}" for key in ("cpu_seconds", "peak_mb"))
        rows.append([LABELS[name], str(len(own)), _rewards(own, after), *costs])
    return markdown_table(head, rows)


def table(groups: Groups) -> str:
    """A row for each library."""
    head = ["", "seeds", "reward before → after", "last fifth", "KL to base, nats"]
    head += ["seconds", "CPU seconds", "peak memory, MB"]
    return markdown_table(head, (_row(name, own) for name, own in groups.items()))


def _row(name: str, own: Sequence[Record]) -> list[str]:
    before = np.mean([record["evaluation"]["base_reward_mean"] for record in own])
    return [
        LABELS[name],
        str(len(own)),
        f"{before:.2f} → {_rewards(own, after)}",
        _rewards(own, last_fifth),
        _interval([kl(record) for record in own], 0),
        *(_interval([record[key] for record in own], 0) for key in ("seconds", "cpu_seconds", "peak_mb")),
    ]


def after(record: Record) -> float:
    """Mean reward of the tuned policy."""
    return float(record["evaluation"]["reward_mean"])


def last_fifth(record: Record) -> float:
    """Mean reward of the last fifth of the training samples."""
    curve = record["curve"]
    return float(np.mean(curve[-max(1, len(curve) // 5) :]))


def kl(record: Record) -> float:
    """KL(policy || pretrained), nats a trajectory."""
    return float(record["evaluation"]["kl_to_base"])


def findings(groups: Groups) -> list[str]:
    """One sentence a library: whether its reward differs from the native agent's by more than the seeds do."""
    return [_verdict(LABELS[name], own, groups["native"]) for name, own in groups.items() if name != "native"]


def _verdict(label: str, own: Sequence[Record], native: Sequence[Record]) -> str:
    ends = difference(own, native, after)
    if math.isnan(ends[1]):
        return f"{label} − native: {_signed(ends[0])}; one seed does not show the noise."
    inside = ends[1] <= 0 <= ends[2]
    says = "within the seeds' noise" if inside else "outside of the seeds' noise"
    bound = max(abs(ends[1]), abs(ends[2]))
    limit = f"; differences of up to {bound:.2f} cannot be excluded" if inside else ""
    fifth, far = difference(own, native, last_fifth), difference(own, native, kl)
    return (
        f"{label} − native: {_signed(ends[0])} ({_signed(ends[1])} to {_signed(ends[2])}) in reward after training, "
        f"**{says}** (Welch's 95 % interval){limit}. Last fifth: {_signed(fifth[0])} ({_signed(fifth[1])} to "
        f"{_signed(fifth[2])}); KL to base: {_signed(far[0], 0)} ({_signed(far[1], 0)} to {_signed(far[2], 0)}) nats."
    )


def difference(
    one: Sequence[Record], other: Sequence[Record], value: Callable[[Record], float]
) -> tuple[float, float, float]:
    """`one` minus `other` in the mean over seeds, and the ends of Welch's 95 % interval; NaN for single seeds.

    Seeds are not paired: the libraries draw their training noise in different ways.
    """
    from scipy import stats

    first, second = [value(record) for record in one], [value(record) for record in other]
    mean = float(np.mean(first) - np.mean(second))
    if min(len(first), len(second)) < 2:
        return mean, math.nan, math.nan
    low, high = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    return mean, float(low), float(high)


def _rewards(own: Sequence[Record], value: Callable[[Record], float]) -> str:
    """Mean and interval, which ends at 0 and 1 where the reward is strict success."""
    shares = all(record["evaluation"].get("success") == after(record) for record in own)
    return _interval([value(record) for record in own], 2, *((0.0, 1.0) if shares else (-math.inf, math.inf)))


def _interval(values: Sequence[float], places: int, least: float = 0.0, most: float = math.inf) -> str:
    numbers = np.array(values, dtype=float)
    text = f"{numbers.mean():,.{places}f}"
    if len(numbers) < 2:
        return text
    low, high = mean_interval(numbers)
    return f"{text} ({max(low, least):,.{places}f} to {min(high, most):,.{places}f})"


def _signed(value: float, places: int = 2) -> str:
    return f"{value:+,.{places}f}".replace("-", "−")


def _count(number: int, noun: str) -> str:
    return f"one {noun}" if number == 1 else f"{number} {noun}s"


def _baselines(groups: Groups) -> str:
    """What the processes hold before the training begins."""
    parts = [f"{np.mean([record['start_mb'] for record in own]):,.0f} ({LABELS[name]})" for name, own in groups.items()]
    return f"of which before the first step {', '.join(parts)}"
