"""Suites: which environments a benchmark runs on, for how many reward queries, and what its scores mean.

A suite is a small TOML file in `suites/`, or one of the user's own, `--suite PATH.toml`; a new file in the folder is
found by itself.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, ConfigDict, Field, Strict

from diffusion_gym.agents.benchmark.records import AgentName, TaskName
from diffusion_gym.agents.training.env_options import EnvOptions
from diffusion_gym.agents.training.presets import Preset
from diffusion_gym.agents.training.schedule import Schedule
from diffusion_gym.agents.training.settings import RunSettings, check_preset, starting_point
from diffusion_gym.registry import unknown_name
from diffusion_gym.schemas import Positive, checked, options_schema

FOLDER: Final = Path(__file__).parent / "suites"
_FILE: Final = ConfigDict(extra="forbid", allow_inf_nan=False)
_REMEDY: Final = "mend the file as docs/benchmark.md says"
_Number = Annotated[Positive, Strict()]


def _is_variant(options: Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(options.get("agent"), str):
        raise ValueError(f"agent={options.get('agent')!r} must name the agent that it is a variant of")
    return options


_Variant = Annotated[Mapping[str, Any], AfterValidator(_is_variant)]


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
        judged_on: whose mean the score is made of: the `reward` of prompts that are trained on, or `held_out_reward`.
    """

    __pydantic_config__ = _FILE

    env: str
    ceiling: Annotated[float, Strict()]
    env_options: Mapping[str, Any] = field(default_factory=dict)
    preset: str | None = None
    probe: str | None = None
    probe_kwargs: Mapping[str, Any] = field(default_factory=dict)
    judged_on: Literal["reward", "held_out_reward"] = "reward"

    def __post_init__(self) -> None:
        known = [entry.name for entry in fields(EnvOptions)]
        for key in self.env_options:
            if key not in known:
                raise ValueError(unknown_name("env_options", key, known))

    @property
    def on_held_out(self) -> bool:
        """Whether the task is judged on prompts that training never sees."""
        return self.judged_on == "held_out_reward"

    def score(self, reward: float, base: float) -> float:
        """The normalised score of a mean of what the task is judged on, `base` being the pretrained model's.

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

    __pydantic_config__ = _FILE

    name: str
    description: str
    tasks: Annotated[Mapping[TaskName, Task], Field(min_length=1)]
    budget: _Number
    evaluations: _Number
    samples: _Number
    batch: _Number = 64
    preset: str | None = None
    device: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    agents: Mapping[AgentName, _Variant] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.samples > self.batch and self.samples % self.batch:
            raise ValueError(f"samples={self.samples} must be a multiple of batch={self.batch}")
        _check_read("overrides", self.overrides)
        for name, options in self.agents.items():
            _check_read(f"agents.{name}", options)

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
        except ValueError as error:
            raise ValueError(f"suite={name!r} is no TOML file: {error}") from error
        except RecursionError:
            raise ValueError(f"suite={name!r} is nested too deep to be read") from None
        if "name" in content:
            raise ValueError(f"suite={name!r}: name={content['name']!r} is that of the file; leave it out")
        return checked(cls, {"name": path.stem, **content}, f"suite={name!r}", _REMEDY)

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
        variant = {key: value for key, value in self.agents.get(agent, {}).items() if key != "agent"}
        device = {} if self.device is None else {"device": self.device}
        values = {**self.overrides, **variant, **device, **chosen.env_options}
        check_preset(f"suite={self.name!r}", Preset(self.name, {**self.overrides, **device}, {config: variant}), config)
        start = starting_point(chosen.env, config, chosen.preset or self.preset, chosen.env_options.get("model"))
        # A preset says how to train; what is asked for is the task's.
        start = replace(start, env_options=replace(start.env_options, prompts=None, strict=None))
        settings: RunSettings = replace(
            self._overlaid(start, values),
            env_options=self._overlaid(start.env_options, values),
            agent_options=self._overlaid(start.agent_options, values),
            seed=seed,
            out=out,
            total_reward_queries=self.budget,
            pictures_every=0,
        )
        self.points(settings.samples_per_iteration)
        return settings

    def _overlaid(self, options: Any, values: Mapping[str, Any]) -> Any:
        """`options` with those of `values` that are theirs."""
        names = frozenset(entry.name for entry in fields(options))
        given = {key: value for key, value in values.items() if key in names}
        schema = options_schema(type(options), names.difference(given))
        return replace(options, **checked(schema, given, f"suite={self.name!r}", _REMEDY).model_dump(by_alias=True))

    def points(self, samples: int) -> list[int]:
        """The reward queries at which a training is measured: whole iterations of `samples`, never past the budget.

        Raises:
            ValueError: the budget is below one iteration.
        """
        marks = (self.budget * (index + 1) // self.evaluations for index in range(self.evaluations))
        points = sorted({mark // samples * samples for mark in marks} - {0})
        if not points:
            raise ValueError(
                f"budget={self.budget} is below one iteration, samples_per_iteration={samples}; use a larger "
                "budget, or a smaller samples_per_iteration in the suite's overrides"
            )
        return points


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


# Options of a training that a benchmark sets itself.
_UNREAD: Final = {entry.name for entry in fields(Schedule)} - {"samples_per_iteration"}


def _check_read(where: str, options: Mapping[str, Any]) -> None:
    """Refuse options that a benchmark would not read."""
    for name in options:
        if name in _UNREAD:
            instead = "write it as the suite's budget" if name == "total_reward_queries" else "leave it out"
            raise ValueError(f"{where}: {name}={options[name]!r} is not read in a benchmark; {instead}")
