"""The records of a benchmark, read as scores: an array a task, an entry a seed, for each agent."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from diffusion_gym.agents.benchmark.records import Record, read_record
from diffusion_gym.agents.benchmark.statistics import (
    Estimate,
    Scores,
    holm,
    interquartile_mean,
    paired_difference,
    probability_of_improvement,
    sign_flip_p,
)
from diffusion_gym.agents.benchmark.suites import Suite
from diffusion_gym.registry import unknown_name
from diffusion_gym.storage import number_or_nan

Cost = Literal["reward_queries", "network_evaluations", "cpu_seconds"]

_SIGNIFICANT: Final = 0.05


@dataclass(frozen=True)
class Verdict:
    """What the runs say of two agents.

    Attributes:
        first: an agent.
        second: another.
        difference: interquartile mean of the paired differences of their scores, first - second.
        probability: that a run of the first scores above one of the second.
        p: of the mean paired difference, by sign flips, adjusted (Holm) for all pairs of the benchmark.
        pairs: runs of the same task and seed that both have.
    """

    first: str
    second: str
    difference: Estimate
    probability: Estimate
    p: float
    pairs: int

    @property
    def word(self) -> Literal["better", "worse", "undecided"]:
        """Better or worse only where the interval lies on one side of 0, and p, adjusted, is at most 0.05."""
        if self.p <= _SIGNIFICANT and self.difference.above(0):
            return "better"
        return "worse" if self.p <= _SIGNIFICANT and self.difference.below(0) else "undecided"


@dataclass(frozen=True)
class Results:
    """A benchmark's records.

    Attributes:
        suite: the suite that they are of.
        records: of the runs that succeeded, by (agent, task, seed).
        failures: of the others.
        folder: where they were read.
    """

    suite: Suite
    records: Mapping[tuple[str, str, int], Record]
    failures: Sequence[Record]
    folder: Path

    @classmethod
    def read(cls, folder: Path, suite: Suite | None = None) -> Results:
        """Read the records of a benchmark.

        Args:
            folder: the benchmark's `--out`.
            suite: the suite; by default the one whose file the folder holds.

        Raises:
            FileNotFoundError: there is no record, or no suite.
            ValueError: a record is truncated or of something else, of a task that the suite has not, or without what
                the task is judged on.
        """
        records = [read_record(path) for path in sorted((folder / "records").glob("*.json"))]
        if not records:
            raise FileNotFoundError(f"{str(folder)!r} holds no benchmark; pass the --out of `diffusion-gym bench`")
        files = sorted(folder.glob("*.toml"))
        if suite is None and len(files) != 1:
            raise FileNotFoundError(
                f"{folder} must hold one .toml file, its suite; `diffusion-gym bench` puts it there"
            )
        suite = suite or Suite.load(str(files[0]))
        for row in records:
            if row["task"] not in suite.tasks:
                unknown = unknown_name("task", row["task"], [*suite.tasks])
                raise ValueError(f"{folder / 'records'} has a record of another suite: {unknown}")
            require_measured(row, suite)
        good = {(row["agent"], row["task"], row["seed"]): row for row in records if "error" not in row}
        return cls(suite, good, [row for row in records if "error" in row], folder)

    def at_equal(self, cost: Cost) -> Results:
        """The same runs as if each had ended at one cost, the largest that all runs of its task have reached.

        Between two points a run's measures are taken to change linearly with the cost.

        Raises:
            ValueError: a record does not say what its run cost.
        """
        limits: dict[str, float] = {}
        for (_, task, _), record in self.records.items():
            spent = record["points"][-1].get(cost)
            if spent is None:
                raise ValueError(
                    f"at_equal={cost!r}: the record of {record['agent']} on {task}, seed {record['seed']}, does not "
                    "say what it cost; run it again, or compare at equal reward_queries"
                )
            limits[task] = min(spent, limits.get(task, spent))
        cut = {
            key: {**record, "points": _until(record["points"], cost, limits[key[1]])}
            for key, record in self.records.items()
        }
        return replace(self, records=cut)

    @property
    def agents(self) -> list[str]:
        """The agents that have a run, the best one first."""
        names = list(dict.fromkeys(agent for agent, _, _ in self.records))
        return sorted(names, key=lambda agent: -interquartile_mean(self.scores(agent)).value)

    def tasks_of(self, agent: str) -> list[str]:
        """The tasks that an agent has a record of, in the suite's order."""
        return [task for task in self.suite.tasks if any(key[:2] == (agent, task) for key in self.records)]

    def seeds(self, agent: str, task: str) -> list[int]:
        """The seeds that an agent has on a task."""
        return sorted(seed for a, t, seed in self.records if (a, t) == (agent, task))

    def failed(self, agent: str) -> int:
        """How many of an agent's runs failed; its scores are of the others."""
        return sum(record["agent"] == agent for record in self.failures)

    def column(self, agent: str, task: str, measure: str, point: int = -1) -> NDArray[np.float64]:
        """A measure at an evaluation point, an entry a seed; NaN where a record lacks it.

        Args:
            agent: the agent.
            task: the task.
            measure: a key of the points.
            point: 0 is the pretrained model, -1 the last.
        """
        rows = [self.records[agent, task, seed]["points"][point] for seed in self.seeds(agent, task)]
        return np.array([row.get(measure) for row in rows], dtype=np.float64)

    def base(self, task: str) -> float:
        """The pretrained model's mean of what a task is judged on, over all seeds.

        In one seed alone its noise would move the whole scale. A seed's is the same for all agents but for rounding;
        a seed that some agents lack counts once.
        """
        measure, rewards = self.suite.tasks[task].judged_on, dict[int, list[float]]()
        for (_, of, seed), record in self.records.items():
            if of == task:
                rewards.setdefault(seed, []).append(number_or_nan(record["points"][0][measure]))
        return float(np.mean([np.mean(values) for values in rewards.values()]))

    def scores(self, agent: str, point: int = -1, tasks: Sequence[str] | None = None) -> Scores:
        """Normalised scores at a point: an array a task, an entry a seed (0 the pretrained model, 1 the ceiling).

        Raises:
            ValueError: the pretrained model is at a task's ceiling.
        """
        return [self._scores_of(agent, task, point) for task in (tasks or self.tasks_of(agent))]

    def _scores_of(self, agent: str, task: str, point: int) -> NDArray[np.float64]:
        chosen, base = self.suite.tasks[task], self.base(task)
        return np.array([chosen.score(mean, base) for mean in self.column(agent, task, chosen.judged_on, point)])

    def paired(self, first: str, second: str) -> tuple[Scores, Scores]:
        """The last scores of two agents on the tasks and seeds that both have."""
        ours: list[NDArray[np.float64]] = []
        theirs: list[NDArray[np.float64]] = []
        for task in self.tasks_of(first):
            common = sorted({*self.seeds(first, task)} & {*self.seeds(second, task)})
            if common:
                for agent, scores in ((first, ours), (second, theirs)):
                    every = dict(zip(self.seeds(agent, task), self._scores_of(agent, task, -1), strict=True))
                    scores.append(np.array([every[seed] for seed in common]))
        return ours, theirs

    def compared(self, first: str, second: str) -> tuple[Estimate, Estimate]:
        """Interquartile mean of the paired differences, and the probability of improvement, over what both have."""
        ours, theirs = self.paired(first, second)
        return paired_difference(ours, theirs), probability_of_improvement(ours, theirs)

    def verdicts(self) -> list[Verdict]:
        """Each pair of agents that have a run in common, the better-ranked agent first."""
        return list(self._verdicts)

    @cached_property
    def _verdicts(self) -> list[Verdict]:
        """Made once: exact tests of many pairs take seconds, and text, summary and page each ask for them."""
        pairs = [(*names, *self.paired(*names)) for names in itertools.combinations(self.agents, 2)]
        pairs = [pair for pair in pairs if pair[2]]
        p = holm([sign_flip_p([a - b for a, b in zip(ours, theirs, strict=True)]) for _, _, ours, theirs in pairs])
        return [
            Verdict(first, second, *self.compared(first, second), adjusted, sum(map(len, ours)))
            for (first, second, ours, _), adjusted in zip(pairs, p, strict=True)
        ]


def require_measured(record: Record, suite: Suite) -> None:
    """Refuse a record of a run that did not measure what its task is judged on.

    Raises:
        ValueError: so it is.
    """
    measure = suite.tasks[record["task"]].judged_on
    if "error" not in record and any(measure not in point for point in record["points"]):
        raise ValueError(
            f"task {record['task']!r}: judged_on={measure!r} is not in the record of {record['agent']}, seed "
            f"{record['seed']}, whose prompts have none that are held out; leave judged_on out of the suite's file"
        )


def _until(points: Sequence[Mapping[str, Any]], cost: str, limit: float) -> list[Mapping[str, Any]]:
    """The points below a cost, and one at it whose measures lie on the lines between its neighbours."""
    below = [point for point in points if point[cost] < limit]
    above = next(point for point in points if point[cost] >= limit)
    if not below or above[cost] == limit:
        return [*below, above]
    share = (limit - below[-1][cost]) / (above[cost] - below[-1][cost])
    both = ((key, number_or_nan(below[-1].get(key)), number_or_nan(value)) for key, value in above.items())
    return [*below, {key: old + share * (new - old) for key, old, new in both}]
