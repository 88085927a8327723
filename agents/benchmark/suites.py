"""Suites: which environments a benchmark runs on, for how many reward queries, and what its scores mean.

A suite is a small TOML file in `suites/`, or one of the user's own, `--suite PATH.toml`; a new file in the folder is
found by itself.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

from diffusion_gym.agents.folders import check_name
from diffusion_gym.agents.presets import Preset
from diffusion_gym.agents.schedule import Schedule
from diffusion_gym.agents.settings import EnvOptions, RunSettings, check_preset, starting_point
from diffusion_gym.registry import unknown_name

FOLDER: Final = Path(__file__).parent / "suites"


@dataclass(frozen=True)
class Task:
    """An environment of a suite.

    Attributes:
        env: its id.
        ceiling: the reward that scores 1, the pretrained model's mean reward scoring 0: tasks become comparable.
        env_options: options of the environment, as `train --env.NAME` takes them.
        preset: hyperparameters to start from, in place of the suite's.
        probe: a reward that is not trained on but measured on the same pictures, to see over-optimisation.
        probe_kwargs: keywords of the probe.
    """

    env: str
    ceiling: float
    env_options: Mapping[str, Any] = field(default_factory=dict)
    preset: str | None = None
    probe: str | None = None
    probe_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        number = isinstance(self.ceiling, int | float) and not isinstance(self.ceiling, bool)
        if not number or not math.isfinite(self.ceiling):
            raise ValueError(f"ceiling={self.ceiling!r} must be a number that is finite, the reward that scores 1")
        if not isinstance(self.env, str):
            raise ValueError(f"env={self.env!r} must be the id of an environment")
        _check_tables(self, "env_options", "probe_kwargs")
        known = [entry.name for entry in fields(EnvOptions)]
        for key in self.env_options:
            if key not in known:
                raise ValueError(unknown_name("env_options", key, known))

    def score(self, reward: float, base: float) -> float:
        """The normalised score of a mean reward, `base` being the pretrained model's.

        Raises:
            ValueError: the pretrained model is at the ceiling, so that there is nothing to normalise with.
        """
        if base == self.ceiling:
            raise ValueError(
                f"ceiling={self.ceiling!r} of {self.env} is what the pretrained model has; write another into the "
                "suite's file and give the same command: nothing runs again"
            )
        return (reward - base) / (self.ceiling - base)


@dataclass(frozen=True)
class Suite:
    """Tasks that a benchmark runs every agent on.

    Attributes:
        name: the file's name without its ending.
        description: one line.
        tasks: the tasks by name.
        budget: reward queries of a training.
        evaluations: measurements in a training, evenly spread; the pretrained model is measured besides.
        samples: pictures of a measurement, a multiple of `batch` where it is larger.
        batch: pictures of a measurement sampled at once; the same for all agents, as the noise depends on it.
        preset: hyperparameters to start from; None for the model's and agent's own.
        device: where the runs go, unless the command line says another.
        overrides: options of the run, the environment or the agent on top of the preset.
        agents: variants of agents by name: `agent`, and the options in which it differs.
    """

    name: str
    description: str
    tasks: Mapping[str, Task]
    budget: int
    evaluations: int
    samples: int
    batch: int = 64
    preset: str | None = None
    device: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    agents: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("budget", "evaluations", "samples", "batch"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
        if self.samples > self.batch and self.samples % self.batch:
            raise ValueError(f"samples={self.samples} must be a multiple of batch={self.batch}")
        _check_tables(self, "overrides", "agents")
        for name in self.tasks:
            check_name("task", name)
        _check_read("overrides", self.overrides)
        for name, options in self.agents.items():
            check_name("agent", name)
            if not isinstance(options, Mapping):
                raise ValueError(f"agents.{name}={options!r} must be a table of options")
            _check_read(f"agents.{name}", options)
            if "agent" not in options:
                raise ValueError(f"agents.{name} lacks agent, the agent that it is a variant of")

    @classmethod
    def load(cls, name: str) -> Suite:
        """The suite of a name, or of a path to a `.toml` file.

        Raises:
            ValueError: an unknown name, or a file that is no suite; the message names the entry.
            FileNotFoundError: no such file.
        """
        path = suite_file(name)
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"suite={name!r} is no TOML file: {error}") from error
        except RecursionError:
            raise ValueError(f"suite={name!r} is nested too deep to be read") from None
        tasks = content.pop("tasks", None)
        if not isinstance(tasks, dict) or not tasks:
            raise ValueError(f"suite={name!r} has no tasks; give at least one [tasks.NAME] with env and ceiling")
        built = {key: _built(Task, f"suite={name!r}, task {key!r}", value) for key, value in tasks.items()}
        return _built(cls, f"suite={name!r}", {"name": path.stem, "tasks": built, **content})

    def trained(self, agent: str) -> str:
        """What is trained under the name `agent`: itself, or the agent that it is a variant of."""
        return str(self.agents[agent]["agent"]) if agent in self.agents else agent

    def settings(self, task: str, agent: str, config: str, seed: int, out: Path) -> RunSettings:
        """The settings of one training of the matrix: preset, then the suite's, the variant's and the task's values.

        Args:
            task: the task's name.
            agent: the agent's name in the benchmark, which may be a variant of the suite.
            config: the native agent whose options and presets it reads.
            seed: of the training.
            out: the run folder.

        Raises:
            ValueError: an unknown agent, preset or option, or a budget below one iteration.
        """
        chosen = self.tasks[task]
        own = {key: value for key, value in self.agents.get(agent, {}).items() if key != "agent"}
        device = {} if self.device is None else {"device": self.device}
        values = {**self.overrides, **own, **device, **chosen.env_options}
        check_preset(f"suite={self.name!r}", Preset(self.name, {**self.overrides, **device}, {config: own}), config)
        start = starting_point(chosen.env, config, chosen.preset or self.preset, chosen.env_options.get("model"))
        # A preset says how to train; what is asked for is the task's.
        start = replace(start, env_options=replace(start.env_options, prompts=None, strict=None))
        found: RunSettings = replace(
            _overlaid(start, values),
            env_options=_overlaid(start.env_options, values),
            agent_options=_overlaid(start.agent_options, values),
            seed=seed,
            out=out,
            total_reward_queries=self.budget,
            pictures_every=0,
        )
        self.points(found.samples_per_iteration)
        return found

    def points(self, samples: int) -> list[int]:
        """The reward queries at which a training is measured: whole iterations of `samples`, never past the budget.

        Raises:
            ValueError: the budget is below one iteration.
        """
        marks = (self.budget * (index + 1) // self.evaluations for index in range(self.evaluations))
        found = sorted({mark // samples * samples for mark in marks} - {0})
        if not found:
            raise ValueError(
                f"budget={self.budget} is below one iteration, samples_per_iteration={samples}; use a larger "
                "budget, or a smaller samples_per_iteration in the suite's overrides"
            )
        return found


def suite_file(name: str) -> Path:
    """The file of a suite's name or `.toml` path.

    Raises:
        ValueError: an unknown name.
        FileNotFoundError: no such file.
    """
    if name.endswith(".toml"):
        if not Path(name).is_file():
            raise FileNotFoundError(f"suite={name!r} is no file; pass a .toml file or one of {', '.join(suites())}")
        return Path(name)
    if name not in suites():
        raise ValueError(unknown_name("suite", name, suites()) + "; or pass a .toml file")
    return FOLDER / f"{name}.toml"


def suites() -> list[str]:
    """The names of the suites that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def _check_tables(entry: Any, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(entry, name), Mapping):
            raise ValueError(f"{name}={getattr(entry, name)!r} must be a table")


# Options of a training that a benchmark sets itself.
_UNREAD: Final = {entry.name for entry in fields(Schedule)} - {"samples_per_iteration"}


def _check_read(where: str, options: Mapping[str, Any]) -> None:
    """Refuse options that a benchmark would not read."""
    for name in options:
        if name in _UNREAD:
            instead = "write it as the suite's budget" if name == "total_reward_queries" else "leave it out"
            raise ValueError(f"{where}: {name}={options[name]!r} is not read in a benchmark; {instead}")


def _overlaid(options: Any, values: Mapping[str, Any]) -> Any:
    """`options` with those of `values` that are theirs."""
    known = {entry.name for entry in fields(options)}
    own = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items() if key in known}
    return replace(options, **own)


def _built(kind: Any, where: str, values: Any) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be a table, not {values!r}")
    known = [entry.name for entry in fields(kind)]
    for key in values:
        if key not in known:
            raise ValueError(f"{where}: {unknown_name('entry', key, known)}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{where} is incomplete: {str(error).split('()')[-1].strip()}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
