"""What a benchmark's page is made of: the scores of its records, and the samples that the run folders keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusion_gym.agents.benchmark.cells import Cell
from diffusion_gym.agents.benchmark.records import Record
from diffusion_gym.agents.benchmark.results import Results
from diffusion_gym.agents.benchmark.statistics import Estimate, mean
from diffusion_gym.agents.benchmark.summary import summary_json
from diffusion_gym.schemas import parse_checked
from diffusion_gym.storage import tensors_metadata

_SERIES = 8  # inks of the page's style


@dataclass(frozen=True)
class Samples:
    """What a run folder keeps of one measurement.

    Attributes:
        path: the file.
        reward_queries: how far the training was.
    """

    path: Path
    reward_queries: int

    @property
    def prompts(self) -> list[str]:
        """The prompts of the samples."""
        stored = tensors_metadata(self.path).get("prompts", "")
        return parse_checked(list[str], stored, f"{self.path}, prompts", "run the cell again")

    def tensor(self, name: str) -> torch.Tensor | None:
        """One tensor of the file, the others left on disk; None where the measurement has none of the name.

        Raises:
            ValueError: the file is truncated or no safetensors file.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self.path), framework="pt") as file:
                return file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"{self.path} is truncated or not a safetensors file ({error}); run the cell again"
            ) from error


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's folder.

    Attributes:
        results: its records.
        seed: whose pictures are shown; None for the first that a run has.
    """

    results: Results
    seed: int | None = None
    _curves: dict[tuple[str, str, str], list[Estimate]] = field(default_factory=dict, init=False)

    @classmethod
    def read(cls, folder: Path, seed: int | None = None) -> Benchmark:
        """Read a benchmark.

        Raises:
            FileNotFoundError: the folder holds no benchmark.
            ValueError: no run has the seed, or a file is truncated.
        """
        benchmark = cls(Results.read(folder), seed)
        seeds = sorted({run_seed for _, _, run_seed in benchmark.results.records})
        if seed is not None and seed not in seeds:
            raise ValueError(f"seed={seed!r} is of no finished run; choose one of {seeds}")
        return benchmark

    @property
    def folder(self) -> Path:
        """The benchmark's folder."""
        return self.results.folder

    @cached_property
    def summary(self) -> Mapping[str, Any]:
        """All numbers of the tables, as `bench` writes them to `summary.json`."""
        return summary_json(self.results)

    @property
    def agents(self) -> list[str]:
        """The agents that have a run, the best one first."""
        return list(self.summary["agents"])

    @property
    def tasks(self) -> list[str]:
        """The tasks that have a run, in the suite's order."""
        return [task for task in self.results.suite.tasks if self.agents_of(task)]

    def agents_of(self, task: str) -> list[str]:
        """The agents that have a run on a task, the best one first."""
        return [agent for agent in self.agents if task in self.summary["agents"][agent]["tasks"]]

    def style(self, agent: str) -> dict[str, Any]:
        """The ink that stands for an agent in every chart, and whether its lines are dashed."""
        place = sorted(self.agents).index(agent)
        return {"ink": f"series-{place % _SERIES + 1}", "dashed": place % (2 * _SERIES) >= _SERIES}

    def records(self, agent: str, task: str) -> list[Record]:
        """The records of an agent on a task, a seed each."""
        return [self.results.records[agent, task, seed] for seed in self.results.seeds(agent, task)]

    def measures(self, task: str) -> list[str]:
        """The measures that the records of a task have."""
        rows = (record["points"][-1] for agent in self.agents_of(task) for record in self.records(agent, task))
        return list(dict.fromkeys(name for row in rows for name, value in row.items() if value is not None))

    def curve(self, agent: str, task: str, measure: str) -> list[Estimate]:
        """At each measurement, the mean over seeds and its 95 % interval."""
        key = agent, task, measure
        if key not in self._curves:
            self._curves[key] = [
                _estimate(self.results.column(agent, task, measure, point))
                for point in range(min(len(record["points"]) for record in self.records(agent, task)))
            ]
        return self._curves[key]

    def means(self, agent: str, task: str, measure: str) -> list[float]:
        """At each measurement, the mean over seeds; NaN where no record has the measure."""
        return [estimate.value for estimate in self.curve(agent, task, measure)]

    def shown_seed(self, agent: str, task: str) -> int:
        """The seed whose pictures are shown: the one asked for, or the agent's first on the task."""
        seeds = self.results.seeds(agent, task)
        return seeds[0] if self.seed is None or self.seed not in seeds else self.seed

    def samples(self, agent: str, task: str, seed: int) -> list[Samples]:
        """The measurements whose samples are there, in the order of the training."""
        folder = Cell(self.results.suite.name, task, agent, seed, str(self.folder)).folder / "points"
        queries: Sequence[int] = [
            point["reward_queries"] for point in self.results.records[agent, task, seed]["points"]
        ]
        measurements = [Samples(folder / f"{count:08d}.safetensors", count) for count in queries]
        return [entry for entry in measurements if entry.path.is_file()]


def _estimate(values: Any) -> Estimate:
    values = values[np.isfinite(values)]
    return mean([values]) if len(values) else Estimate(float("nan"), float("nan"), float("nan"))
