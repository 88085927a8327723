"""The numbers of compare_agents.py: records, means over seeds, intervals, differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from scipy import stats

from diffusion_gym.agents.evaluation import mean_interval
from diffusion_gym.storage import read_json

Record = Mapping[str, Any]
Groups = Mapping[str, Sequence[Record]]

LABELS: Final = {
    "ddpo_sf": "DDPO_SF",
    "ddpo_is": "DDPO_IS",
    "ddpo_iskl": "DDPO_ISKL",
    "dpok": "DPOK",
    "rwr": "RWR",
    "rwr_sparse": "RWR_sparse",
}
# What must agree among all records, and among those of one agent.
COMMON: Final = ("env", "env_options", "preset", "total_reward_queries", "evaluation_samples")
OWN: Final = ("agent_options", "samples_per_iteration", "rollout_batch")


def label(agent: str) -> str:
    """An agent's name on the page."""
    return LABELS.get(agent, agent)


def run_name(agent: str, seed: int) -> str:
    """What the folder and the record of a run are called."""
    return f"{agent.replace(':', '.')}-seed-{seed}"


def read_groups(folder: Path) -> dict[str, list[Record]]:
    """The records by agent, agents in the order of `LABELS`, seeds in order.

    Raises:
        ValueError: there is none, or they cannot be compared.
    """
    records = [read_json(path) for path in folder.glob("*-seed-*.json")]
    if not records:
        raise ValueError(f"{folder} holds no records; make them with `python docs/compare_agents.py run`")
    order = {agent: index for index, agent in enumerate(LABELS)}
    records.sort(key=lambda record: (order.get(record["agent"], len(order)), record["agent"], record["seed"]))
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record["agent"], []).append(record)
    _check(records, COMMON)
    for own in groups.values():
        _check(own, OWN)
    return groups


def _check(records: Sequence[Record], keys: Sequence[str]) -> None:
    for record in records[1:]:
        if differing := [key for key in keys if record[key] != records[0][key]]:
            names = [run_name(entry["agent"], entry["seed"]) for entry in (records[0], record)]
            raise ValueError(f"{' and '.join(names)} cannot be compared: their {', '.join(differing)} differ")


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval; the interval is NaN where there is a single value."""

    mean: float
    low: float
    high: float

    @property
    def significant(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0

    def text(self, sign: str = "", low: float = -math.inf, high: float = math.inf) -> str:
        """Mean and interval; the interval is cut at `low` and `high`, beyond which no value can lie."""
        if math.isnan(self.low):
            return number(self.mean, sign)
        ends = (number(min(max(end, low), high), sign) for end in (self.low, self.high))
        return f"{number(self.mean, sign)} ({' to '.join(ends)})"


def number(value: float, sign: str = "") -> str:
    """A number for the page; `sign="+"` shows a plus."""
    if math.isnan(value):
        return "–"
    places = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    rounded = round(value, places) + 0.0  # no -0.0
    return f"{rounded:{sign if rounded else ''},.{places}f}".replace("-", "−")


def over_seeds(values: Sequence[float]) -> Estimate:
    """Student's interval of the mean of one value a seed."""
    numbers = np.array(values)
    return Estimate(float(numbers.mean()), *(mean_interval(numbers) if len(numbers) > 1 else (math.nan, math.nan)))


def over_pairs(records: Sequence[Record], key: str) -> Estimate:
    """The change over the evaluation samples of all seeds, with an interval from pairs.

    A pair is one prompt in one run, before and after from the same noise, and counts by its samples. The standard
    error is that of a weighted mean of independent pairs: Student's where all have one size.

    Args:
        records: of one agent.
        key: `success` or `reward`.
    """
    rows = [row for record in records for row in record["evaluation"]["prompts"].values()]
    weights = np.array([row["samples"] for row in rows], dtype=float)
    weights /= weights.sum()
    changes = np.array([row[key] - row[f"base_{key}"] for row in rows])
    mean, pairs = float(weights @ changes), len(rows)
    if pairs < 2:
        return Estimate(mean, math.nan, math.nan)
    error = math.sqrt(pairs / (pairs - 1) * float(weights**2 @ (changes - mean) ** 2))
    half = float(stats.t.ppf(0.975, pairs - 1)) * error
    return Estimate(mean, mean - half, mean + half)


def contrast(groups: Groups, one: str, other: str, value: Callable[[Record], float]) -> Estimate:
    """`one` minus `other` in the mean over the seeds that both have, paired by seed."""
    first, second = ({record["seed"]: value(record) for record in groups[name]} for name in (one, other))
    return over_seeds([first[seed] - second[seed] for seed in first if seed in second] or [math.nan])


@dataclass(frozen=True)
class Measure:
    """What the comparison goes by.

    Attributes:
        name: `success` or `reward`.
        key: its mean in an evaluation.
        curve: its mean in the training curve.
        low: the least value it can have.
        high: the largest.
    """

    name: str
    key: str
    curve: str
    low: float
    high: float

    @classmethod
    def of(cls, groups: Groups) -> Measure:
        """The share of successes where every record has it, else the reward."""
        records = [record for own in groups.values() for record in own]
        if all("success" in record["evaluation"] and "success_mean" in record["curve"] for record in records):
            return cls("success", "success", "success_mean", 0.0, 1.0)
        return cls("reward", "reward_mean", "reward_mean", -math.inf, math.inf)

    def before(self, record: Record) -> float:
        """The pretrained model's."""
        return float(record["evaluation"][f"base_{self.key}"])

    def after(self, record: Record) -> float:
        """The tuned policy's."""
        return float(record["evaluation"][self.key])

    def change(self, record: Record) -> float:
        """After minus before."""
        return self.after(record) - self.before(record)

    def held_out_change(self, record: Record) -> float:
        """After minus before for prompts that training never saw; NaN where there are none."""
        part = record["evaluation"].get("held_out")
        return math.nan if part is None else self.change({"evaluation": part})


def kl(record: Record) -> float:
    """KL divergence of the tuned policy to the pretrained model, nats a trajectory."""
    return float(record["evaluation"]["kl_to_base"])


def training_reward(record: Record, queries: float) -> float:
    """Mean training reward of the iterations that end in the tenth of the budget before `queries`."""
    ends, rewards = np.array(record["curve"]["reward_queries"]), np.array(record["curve"]["reward_mean"])
    own = rewards[(ends <= queries) & (ends > queries - record["total_reward_queries"] / 10)]
    if not len(own):  # longer iterations than that
        own = rewards[ends <= queries][-1:]
    return float(own.mean()) if len(own) else math.nan
