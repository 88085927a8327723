"""One cell of the matrix: train one agent on one task with one seed, measure it on the way, keep one record."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, cast

from diffusion_gym.agents.benchmark.learner import Learner
from diffusion_gym.agents.benchmark.library_agents import LIBRARY_AGENTS, config_of, make_learner
from diffusion_gym.agents.benchmark.machine import hardware, peak_memory_mb
from diffusion_gym.agents.benchmark.measures import Evaluator, Work
from diffusion_gym.agents.benchmark.records import FORMAT, POINTS, check_agent, file_name, read_points, read_record
from diffusion_gym.agents.benchmark.suites import Suite, Task
from diffusion_gym.agents.training import run_files
from diffusion_gym.agents.training.ending import leave
from diffusion_gym.agents.training.folders import check_name
from diffusion_gym.agents.training.run_files import read_config
from diffusion_gym.agents.training.runs import library_versions, write_config
from diffusion_gym.agents.training.settings import RunSettings, make_env, migrated
from diffusion_gym.agents.training.threads import prepare_process
from diffusion_gym.envs.vector import DenoisingVectorEnv
from diffusion_gym.prompts import PromptSet
from diffusion_gym.rewards import make_reward
from diffusion_gym.rewards.time_limit import limited
from diffusion_gym.rewards.tokens import tokens_only_to
from diffusion_gym.storage import exact_json, save_tensors, write_json

_NEVER: Final = 10**9


@dataclass(frozen=True)
class Cell:
    """What a cell is to do; JSON values only, so that it travels to another process or machine.

    Attributes:
        suite: a suite's name or `.toml` path.
        task: the task's name.
        agent: a native agent, `module:Class`, a library's, such as `sb3/ppo`, or a variant that the suite defines.
        seed: of the training; the noise of the measurements derives from it and is the same for every agent.
        out: the benchmark's folder.
        budget: reward queries; None for the suite's.
        device: None for the suite's.
        threads: CPU threads; 0 leaves torch's own choice.
        token_to: the only addresses that get tokens of the environment; None for all that the suite names.

    Raises:
        ValueError: a task, agent or seed that could name a file elsewhere.
    """

    suite: str
    task: str
    agent: str
    seed: int
    out: str
    budget: int | None = None
    device: str | None = None
    threads: int = 1
    token_to: Sequence[str] | None = None

    def __post_init__(self) -> None:
        check_name("task", self.task)
        check_agent(self.agent)
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0:
            raise ValueError(f"seed={self.seed!r} must be a whole number of at least 0")

    @property
    def name(self) -> str:
        """What its folder and its record are called."""
        return f"{self.task}--{file_name(self.agent)}--seed-{self.seed}"

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.out) / "runs" / self.name

    @property
    def record(self) -> Path:
        """The file of its record."""
        return Path(self.out) / "records" / f"{self.name}.json"

    @property
    def about(self) -> dict[str, Any]:
        """How its record begins, whatever comes of it."""
        return {"format": FORMAT, "task": self.task, "agent": self.agent, "seed": self.seed, "threads": self.threads}

    def load_suite(self) -> Suite:
        """The suite, with the budget and the device of this cell."""
        suite = Suite.load(self.suite)
        budget = suite.budget if self.budget is None else self.budget
        return replace(suite, budget=budget, device=self.device or suite.device)

    def settings(self, suite: Suite) -> RunSettings:
        """The settings of the training.

        Raises:
            ValueError: an unknown agent, preset or option, a library that is not installed.
        """
        config = config_of(suite.trained(self.agent))
        settings = suite.settings(self.task, self.agent, config, self.seed, self.folder)
        # A checkpoint at each measurement: an interrupted cell goes on from the one of its last finished measurement.
        settings = replace(settings, checkpoint_every=_NEVER, keep_checkpoints=2, threads=self.threads)
        return settings if self.token_to is None else replace(settings, token_to=tuple(self.token_to))

    def finished(self) -> bool:
        """Whether its record is there, of a training that succeeded.

        Raises:
            ValueError: the record, or what the run folder holds of a training, is of another suite or other settings.
        """
        suite = self.load_suite()
        if self.record.is_file() and "error" not in (record := read_record(self.record)):
            if record["suite"] != suite.name:
                raise ValueError(f"{self.record} is of the suite {record['suite']!r}; choose another --out")
            self._require_same(self.record, record["settings"], record["format"] == FORMAT, suite)
            return True
        if read_points(self.folder):
            config = read_config(self.folder)
            self._require_same(self.folder / "config.json", config.settings, config.format == run_files.FORMAT, suite)
        return False

    def _require_same(self, path: Path, stored: Mapping[str, Any], whole: bool, suite: Suite) -> None:
        settings = self.settings(suite)
        file_format = run_files.FORMAT if whole else run_files.OLD_FORMAT
        known = migrated(stored, file_format, type(settings.agent_options))
        if changed := _differing(_as_stored(known), _as_stored(settings.to_json())):
            raise ValueError(f"{path} is of other settings ({changed}); remove it or choose another --out")


def run_cell(cell: Cell) -> dict[str, Any]:
    """Train and measure; writes the record, also that of a failure.

    Returns:
        The record: `points`, each with the measures and `reward_queries`, `seconds`, `network_evaluations`; or `error`.
    """
    started, about = time.perf_counter(), cell.about | {"versions": library_versions(), "hardware": hardware()}
    try:
        suite = cell.load_suite()
        settings, trained = cell.settings(suite), suite.trained(cell.agent)
        if trained in LIBRARY_AGENTS:
            library = LIBRARY_AGENTS[trained].distribution
            about["versions"][library] = version(library)
        about |= {"suite": suite.name, "trained": trained, "settings": _as_stored(settings.to_json())}
        points = _train(cell, suite, settings)
        record = {**about, "points": points, "peak_memory_mb": peak_memory_mb()}
    except (Exception, SystemExit) as error:
        lines = traceback.format_exc().splitlines()
        record = {**about, "error": f"{type(error).__name__}: {error}", "traceback": lines[-12:]}
    record["total_seconds"] = round(time.perf_counter() - started, 1)
    write_json(cell.record, record)
    return record


def _train(cell: Cell, suite: Suite, settings: RunSettings) -> list[dict[str, Any]]:
    prepare_process(settings.threads)
    learner, points = _begin(cell, suite.trained(cell.agent), settings)
    work = Work(learner.policy)
    if points:
        work.evaluations, work.seconds = points[-1]["network_evaluations"], points[-1]["seconds"]
        work.cpu_seconds = points[-1].get("cpu_seconds", 0.0)
    evaluator = _evaluator(cell, suite, settings)
    for target in [0, *suite.points(settings.samples_per_iteration)]:
        if points and points[-1]["reward_queries"] >= target:
            continue
        if target:
            with work.counting():
                learner.train_until(target)
        with learner.weights():
            points.append(_point(cell, learner, evaluator, work))
        write_json(cell.folder / POINTS, points)
    return points


def _begin(cell: Cell, trained: str, settings: RunSettings) -> tuple[Learner, list[dict[str, Any]]]:
    """The learner, at the last point that it has behind it, and these points."""
    points = read_points(cell.folder)
    learner = make_learner(trained, settings)
    if points and not learner.go_back(points[-1]["reward_queries"]):
        points, learner = [], make_learner(trained, settings)
    if not points:
        if cell.folder.exists():
            shutil.rmtree(cell.folder)
        write_config(settings)
    return learner, points


def _point(cell: Cell, learner: Learner, evaluator: Evaluator, work: Work) -> dict[str, Any]:
    started = time.perf_counter()
    measurement = evaluator.measure(learner.policy)
    path = cell.folder / "points" / f"{learner.reward_queries:08d}.safetensors"
    save_tensors(path, measurement.samples, {"prompts": exact_json(measurement.prompts)})
    return {
        "reward_queries": learner.reward_queries,
        "seconds": round(work.seconds, 3),
        "cpu_seconds": round(work.cpu_seconds, 3),
        "network_evaluations": work.evaluations,
        "measuring_seconds": round(time.perf_counter() - started, 3),
        **{name: value if math.isfinite(value) else None for name, value in measurement.values.items()},
    }


def _evaluator(cell: Cell, suite: Suite, settings: RunSettings) -> Evaluator:
    batch = min(suite.batch, suite.samples)
    env = make_env(settings, batch)
    prompts: PromptSet = cast(DenoisingVectorEnv, env.unwrapped).prompt_set
    held_out = make_env(settings, batch, prompts.held_out_set()) if prompts.held_out else None
    task = suite.tasks[cell.task]
    require_judged_prompts(cell.task, task, prompts)
    with tokens_only_to(cell.token_to):
        made = make_reward(task.probe, **task.probe_kwargs) if task.probe else None
    probe = made and limited(made, settings.env_options.reward_seconds)
    return Evaluator(env, held_out, suite.samples, cell.seed, probe)


def require_judged_prompts(name: str, task: Task, prompts: PromptSet) -> None:
    """Refuse a task that is judged on held-out prompts but has none.

    Raises:
        ValueError: so it is.
    """
    if task.on_held_out and not prompts.held_out:
        raise ValueError(
            f"judged_on={task.judged_on!r} of the task {name!r}: its prompts, {prompts.name!r}, have none that are "
            "held out; leave it out of the suite's file, or choose a prompt set that has"
        )


def _as_stored(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that make a run what it is, as JSON gives them back."""
    stored: dict[str, Any] = json.loads(exact_json(settings))
    return {key: value for key, value in stored.items() if key not in _FREE}


_FREE: Final = ("threads",)  # another number of them does not make another run


def _differing(stored: Any, asked: Any, name: str = "") -> str:
    """The first option that differs, or that one of the two lacks."""
    if isinstance(stored, dict) and isinstance(asked, dict):
        differences = (_differing(stored.get(key, _NONE), asked.get(key, _NONE), key) for key in {**asked, **stored})
        return next(filter(None, differences), "")
    return "" if stored == asked else f"{name}={asked!r}, there {stored!r}"


class _NoSuchOption:
    def __repr__(self) -> str:
        return "no such option"


_NONE: Final = _NoSuchOption()


def main(arguments: list[str]) -> int:
    """Run the cell that the first argument describes, as JSON; 1 if it failed.

    With `--end-with-parent` the process ends when its standard input does, which the parent's death brings about.
    """
    if "--end-with-parent" in arguments:
        threading.Thread(target=_end_with_input, daemon=True).start()
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is the parent's: a reward may raise what looks like it
    record = run_cell(Cell(**json.loads(arguments[0])))
    return 1 if "error" in record else 0


def _end_with_input() -> None:
    # Not by sys.stdin.read, whose lock Python would wait for in vain when it ends.
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
