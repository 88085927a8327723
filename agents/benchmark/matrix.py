"""The matrix agents x tasks x seeds: which cells there are, and running those that are not finished.

On one machine each cell is a process of its own; on a cluster each is a Ray task. Either way a cell that fails, or
whose process is killed, leaves a record that says so, and the others go on.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Final

import gymnasium as gym

from diffusion_gym.agents.benchmark.cells import Cell, require_judged_prompts, run_cell
from diffusion_gym.agents.benchmark.library_agents import require_package
from diffusion_gym.agents.benchmark.records import read_record
from diffusion_gym.agents.benchmark.suites import Suite, Task
from diffusion_gym.envs.registration import environment_ids
from diffusion_gym.prompts import make_prompts
from diffusion_gym.registry import unknown_name
from diffusion_gym.rewards import REWARDS
from diffusion_gym.storage import exact_json, write_json

OnRecord = Callable[[Cell, dict[str, Any]], None]

_POLL_SECONDS: Final = 0.1
_RETRIES: Final = 2  # of a Ray task whose worker died; a cell goes on from its last measurement


def cells_of(suite: str, agents: Sequence[str], seeds: int, out: Path, **options: Any) -> list[Cell]:
    """All cells of a matrix, seed by seed, so that an early stop leaves whole comparisons.

    Args:
        suite: a suite's name or `.toml` path.
        agents: the agents.
        seeds: how many; they are 0, 1, ...
        out: the benchmark's folder.
        **options: `budget`, `device`, `threads` and `token_to` of `Cell`.

    Raises:
        ValueError: an unknown suite, agent or option, or agents whose presets ask for different environments; nothing
            has run then.
    """
    if seeds < 1:
        raise ValueError(f"seeds={seeds!r} must be at least 1")
    if not agents:
        raise ValueError("agents is empty; give at least one")
    names = list(dict.fromkeys(agents))
    tasks = Suite.load(suite).tasks
    every = itertools.product(range(seeds), tasks, names)
    cells = [Cell(suite, task, agent, seed, str(out), **options) for seed, task, agent in every]
    _check(cells[: len(tasks) * len(names)])
    return cells


def _check(cells: Sequence[Cell]) -> None:
    """Say what is misspelt before the first cell runs, and refuse agents on different environments."""
    first: dict[str, tuple[Cell, Any]] = {}
    for name, task in cells[0].load_suite().tasks.items():
        _check_names(name, task)
    for cell in cells:
        suite = cell.load_suite()
        options = cell.settings(suite).env_options
        if cell.task not in first and (prompts := options.keywords().get("prompts")) is not None:
            require_judged_prompts(cell.task, suite.tasks[cell.task], make_prompts(prompts))
        other, theirs = first.setdefault(cell.task, (cell, options))
        names = [entry.name for entry in fields(options)]
        if differ := [name for name in names if getattr(theirs, name) != getattr(options, name)]:
            told = ", ".join(f"{name}={getattr(theirs, name)!r} and {getattr(options, name)!r}" for name in differ)
            raise ValueError(
                f"task {cell.task!r}: by their presets {other.agent!r} and {cell.agent!r} would not train in the same "
                f"environment: {told}; set {', '.join(differ)} in the suite's overrides, or give the suite a preset"
            )


def _check_names(name: str, task: Task) -> None:
    """Refuse an environment or a probe that does not exist; a probe of the user's own has to wait for its run."""
    try:
        gym.spec(task.env)
    except gym.error.Error:
        raise ValueError(f"task {name!r}: {unknown_name('env', task.env, list(environment_ids()))}") from None
    if task.probe is not None and task.probe.isidentifier() and task.probe not in REWARDS:
        raise ValueError(f"task {name!r}: {unknown_name('probe', task.probe, REWARDS.names())}")


def run_local(cells: Sequence[Cell], jobs: int, on_record: OnRecord) -> None:
    """Run cells in processes of their own, `jobs` at once; they end with this one, and the same command goes on.

    Args:
        cells: the cells to run.
        jobs: processes at once.
        on_record: called with each cell and its record, as it ends.
    """
    waiting, running = deque(_cleared(cells)), dict[Cell, subprocess.Popen[bytes]]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                cell = waiting.popleft()
                running[cell] = _start(cell)
            ended = [cell for cell, process in running.items() if process.poll() is not None]
            for cell in ended:
                code = running.pop(cell).returncode
                log = _log(cell)
                on_record(cell, _record_of(cell, f"the process ended with exit code {code} and no record; see {log}"))
            if not ended:
                time.sleep(_POLL_SECONDS)
    finally:
        for process in running.values():
            process.kill()
        for process in running.values():
            process.wait()


def _start(cell: Cell) -> subprocess.Popen[bytes]:
    log = _log(cell)
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(cell.threads)} if cell.threads else {})}
    # -P: the current directory is no place to import from, but for what `module:attribute` names.
    command = [sys.executable, "-P", "-m", "diffusion_gym.agents.benchmark.cells", exact_json(asdict(cell))]
    with log.open("ab") as file:
        return subprocess.Popen(
            [*command, "--end-with-parent"],
            stdin=subprocess.PIPE,  # which closes when this process dies, by whatever
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C is for this process, which then ends its children
        )


def _log(cell: Cell) -> Path:
    return Path(cell.out) / "logs" / f"{cell.name}.log"


def run_ray(cells: Sequence[Cell], address: str | None, gpus: float, on_record: OnRecord) -> None:
    """Run cells as Ray tasks, on a cluster or on this machine; `out` must be a folder that all machines share.

    Args:
        cells: the cells to run.
        address: of the cluster; None starts Ray on this machine, `auto` finds the one that runs here.
        gpus: GPUs that a cell takes, also a part of one.
        on_record: called with each cell and its record, as it ends.

    Raises:
        ValueError: Ray is not installed.
    """
    require_package("ray", "ray", "engine='ray'")
    import ray

    with _ray(ray, address):
        # max_calls=1: a process for each cell, so that its peak memory is its own
        cpus = max([1, *(cell.threads for cell in cells)])
        remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_calls=1, max_retries=_RETRIES)(run_cell)
        waiting = {remote.remote(cell): cell for cell in _cleared(cells)}
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            cell = waiting.pop(done)
            try:
                ray.get(done)
                reason = "the task left no record in out, which must be a folder that all machines share"
            except ray.exceptions.RayError as error:
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
            on_record(cell, _record_of(cell, reason))


@contextmanager
def _ray(ray: Any, address: str | None) -> Iterator[None]:
    started = not ray.is_initialized()
    if started:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        if started:
            ray.shutdown()


def _cleared(cells: Sequence[Cell]) -> Sequence[Cell]:
    """The cells, their old records (of failures) removed, so that a record is of this run."""
    for cell in cells:
        cell.record.unlink(missing_ok=True)
    return cells


def _record_of(cell: Cell, otherwise: str) -> dict[str, Any]:
    """The record that a cell wrote; one that says `otherwise` where it could write none."""
    if not cell.record.is_file():
        write_json(cell.record, {**cell.about, "error": otherwise})
    try:
        return read_record(cell.record)
    except ValueError as error:
        return {**cell.about, "error": str(error)}
