"""The command `bench`: run a suite's matrix, and say how the agents compare."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, Literal

from diffusion_gym.agents.algorithms import AGENTS
from diffusion_gym.agents.benchmark.cells import Cell
from diffusion_gym.agents.benchmark.library_agents import require_package
from diffusion_gym.agents.benchmark.matrix import cells_of, run_local, run_ray
from diffusion_gym.agents.benchmark.records import POINTS, file_name, read_record
from diffusion_gym.agents.benchmark.results import Cost, Results, require_measured
from diffusion_gym.agents.benchmark.suites import FOLDER, Suite, Task, suite_file, suites
from diffusion_gym.agents.benchmark.summary import summary_text, write_summary
from diffusion_gym.agents.training.ending import ENDING, on_ending
from diffusion_gym.agents.training.folders import check_out, content, holding
from diffusion_gym.agents.training.progress import duration
from diffusion_gym.agents.training.threads import check_threads
from diffusion_gym.agents.training.trust import Seal, require_trust, seal_of, suite_claims, write_seal
from diffusion_gym.devices import device_called
from diffusion_gym.storage import number_or_nan, write_text

_MOST_SEEDS: Final = 1_000


@dataclass(frozen=True)
class BenchOptions:
    """Compare agents on a suite of environments, seed by seed; the same command goes on where it was stopped.

    `diffusion-gym bench --list` shows the suites.
    """

    suite: str
    """A suite's name, or the path of a .toml file like those in agents/benchmark/suites/."""
    out: Path
    """Where the records, the run folders and the logs go."""
    agents: str | None = None
    """Agents, separated by commas: native ones, module:Class, sb3/ppo, sb3/a2c, sb3/ddpo_ppo, tianshou/ppo,
    tianshou/reinforce, or variants that the suite defines. By default the suite's variants, else all native ones."""
    seeds: int = 5
    """Seeds 0, 1, ... of each agent on each task; those of the same number share their noise."""
    budget: int | None = None
    """Reward queries of each training; by default the suite's."""
    at_equal: Cost = "reward_queries"
    """What the printed comparison holds equal: the reward queries, which all runs get alike; or network evaluations or
    CPU seconds, each run being cut where the least of its task ended. The files hold the whole runs."""
    jobs: int = 1
    """Trainings at once on this machine."""
    threads: int = 1
    """CPU threads of each training; 0 leaves torch's own choice."""
    device: str | None = None
    """Device of each training; by default the suite's."""
    engine: Literal["processes", "ray"] = "processes"
    """Processes on this machine, or tasks of Ray (extra `ray`)."""
    ray_address: str | None = None
    """Address of a Ray cluster; by default Ray is started on this machine."""
    gpus: float = 0.0
    """GPUs that a training takes of Ray, also a part of one."""
    trust: bool = False
    """Run, contact, read and write what the suite's file names, or a folder that was not made here; docs/trust.md."""
    token_to: tuple[str, ...] | None = None
    """The only addresses that get the tokens of the environment; by default none that the suite names."""


def run_bench(options: BenchOptions) -> int:
    """Run what is not finished, write `summary.json` and `points.csv`, and print how the agents compare.

    Returns:
        The exit code: 1 if a run failed.

    Raises:
        ValueError: an unknown suite, agent or option, a device or library that is missing, or what `out` holds is of
            another suite or of other settings; nothing has run then.
        Untrusted: the suite's file names something that is not registered, or `out` was not made here and has links.
        FileExistsError: `out` holds something else than a benchmark, or another `bench` runs in it.
    """
    for name, least in (("seeds", 1), ("budget", 1), ("jobs", 1), ("threads", 0), ("gpus", 0)):
        value = getattr(options, name)
        if value is not None and not value >= least:  # nan is neither
            raise ValueError(f"{name}={value!r} must be at least {least}")
    if options.seeds > _MOST_SEEDS:
        raise ValueError(f"seeds={options.seeds!r} must be at most {_MOST_SEEDS}")
    if options.engine == "ray":
        require_package("ray", "ray", "engine='ray'")
    else:  # of a cluster only the machine that runs a cell can tell
        check_threads(options.threads)
        if (device := options.device or Suite.load(options.suite).device) is not None:
            device_called(device)
    out = options.out.absolute()  # another process may have another current directory
    check_out(out, "benchmark", made_by_bench)
    chosen: dict[str, Any] = {"budget": options.budget, "device": options.device, "threads": options.threads}
    seal = _seal(options, out)
    chosen["token_to"] = () if seal is None else seal.token_to
    cells = cells_of(options.suite, _agents(options), options.seeds, out, **chosen)
    with holding(out), on_ending(_end, [signum for signum in ENDING if signum != signal.SIGINT]):
        return _run(options, out, cells, seal)


def _end(signum: int) -> None:
    raise KeyboardInterrupt


def _run(options: BenchOptions, out: Path, cells: list[Cell], seal: Seal | None) -> int:
    """Run what is not finished of a folder that this process holds; the exit code."""
    copy = keep_suite(options.suite, out)
    if seal is not None:
        write_seal(out, seal)
    cells = [replace(cell, suite=str(copy)) for cell in cells]
    todo = [cell for cell in cells if not cell.finished()]
    suite = Suite.load(str(copy))
    progress = _Progress(suite, len(cells), len(cells) - len(todo), options.jobs)
    if done := [cell for cell in cells if cell not in todo]:
        progress.seconds = [float(read_record(cell.record)["total_seconds"]) for cell in done]
    left = progress.left() if done or not todo else "; the first that ends tells how long they take"
    queries = options.budget or suite.budget
    runs = f"{len(cells)} run{'' if len(cells) == 1 else 's'} of {queries:,} reward queries"
    print(f"{runs}, {len(done)} finished before{left}; records in {out / 'records'}", flush=True)
    if not todo:
        pass
    elif options.engine == "ray":
        run_ray(todo, options.ray_address, options.gpus, progress.show)
    else:
        run_local(todo, options.jobs, progress.show)
    results = Results.read(out)
    write_summary(results)
    print(f"At equal {options.at_equal}:\n{summary_text(results, options.at_equal)}")
    if progress.failed:
        print(f"{progress.failed} runs failed; the same command tries them again", file=sys.stderr)
    print(f"Next: diffusion-gym report {options.out}")
    return 1 if progress.failed else 0


def _seal(options: BenchOptions, out: Path) -> Seal | None:
    """The seal that `out` gets; None for a folder that somebody else made.

    Raises:
        Untrusted: the suite's file names something, or the folder has links, that nobody has agreed to.
    """
    source = suite_file(options.suite)
    seal, copy = seal_of(out), out / source.name
    if seal is None or not copy.is_file() or copy.read_bytes() != source.read_bytes():
        claims = [] if source.parent == FOLDER else suite_claims(asdict(Suite.load(options.suite)), Task)
        seal = require_trust(out, claims, options.trust, source if claims else None)
        seal = seal or (None if content(out) else Seal())
    return seal if seal is None or options.token_to is None else Seal(options.token_to)


def _agents(options: BenchOptions) -> list[str]:
    if options.agents is None:
        return list(Suite.load(options.suite).agents) or AGENTS.names()
    return [entry.strip() for entry in options.agents.split(",") if entry.strip()]


def suites_text() -> str:
    """The suites that come with the package, with their tasks."""
    width = 2 + max(map(len, suites()))
    lines = []
    for suite in map(Suite.load, suites()):
        lines.append(f"{suite.name:{width}}{suite.description}")
        lines.append(f"{'':{width}}{suite.budget} reward queries a run; tasks: {', '.join(suite.tasks)}")
    return "\n".join(lines)


def keep_suite(suite: str, out: Path) -> Path:
    """Copy a suite's file to the benchmark's folder, so that its records stay readable when the suite changes.

    Tasks and agents may join, and those that were not measured may change.

    Raises:
        ValueError: the folder is of another suite.
    """
    source = suite_file(suite)
    target, text, asked = out / source.name, source.read_text(encoding="utf-8"), Suite.load(suite)
    done, failed = [path.parent.name for path in out.glob(f"runs/*/{POINTS}")], list[Path]()
    for path in sorted((out / "records").glob("*.json")):
        record = read_record(path)
        if "error" not in record:
            done.append(path.stem)
        elif record["task"] not in asked.tasks:
            failed.append(path)
        if record["task"] in asked.tasks:
            require_measured(record, asked)
    ours = _measured(asked, done)
    for other in out.glob("*.toml"):
        theirs = _measured(Suite.load(str(other)), done)
        differ = [entry.name for entry in fields(Suite) if getattr(ours, entry.name) != getattr(theirs, entry.name)]
        if not differ:
            continue
        if done:
            raise ValueError(
                f"out={str(out)!r} holds a benchmark of another suite, {other.name}; choose another --out. It differs "
                f"in {', '.join(differ)}. If only some of its tasks or agents have changed, remove their records and "
                "runs"
            )
        other.unlink()
    for path in failed:  # of a task that the suite no longer has
        path.unlink()
    write_text(target, text)
    return target


def made_by_bench(out: Path) -> bool:
    """Whether a folder is one that `bench` made: its only `.toml` file is a suite, beside the folders of its runs.

    A kill before the first run has its folder leaves the suite and perhaps the logs.
    """
    copies = list(out.glob("*.toml"))
    try:
        whole = len(copies) == 1 and not copies[0].is_symlink() and Suite.load(str(copies[0])) is not None
    except ValueError:
        return False
    begun = any((out / name).is_dir() for name in ("records", "runs"))
    return whole and (begun or {path.name for path in content(out)} <= {copies[0].name, "logs"})


def _measured(suite: Suite, done: Sequence[str]) -> Suite:
    """The part of a suite that runs of these names were measured by; what only reads them may always change."""
    return replace(
        suite,
        description="",
        tasks={
            name: replace(task, ceiling=0.0, judged_on="reward")
            for name, task in suite.tasks.items()
            if any(run.startswith(f"{name}--") for run in done)
        },
        agents={
            name: options
            for name, options in suite.agents.items()
            if any(f"--{file_name(name)}--seed-" in run for run in done)
        },
    )


class _Progress:
    """A line for each run that ends, with the time that the others will take: that of those so far, `jobs` at once."""

    def __init__(self, suite: Suite, number: int, done: int, jobs: int) -> None:
        self.suite, self.number, self.done, self.jobs, self.failed = suite, number, done, jobs, 0
        self.seconds: list[float] = []  # that runs took, failed ones apart

    def left(self) -> str:
        """The time left, as the end of a sentence; empty where nothing is left or nothing has ended yet."""
        runs = self.number - self.done
        if not runs or not self.seconds:
            return ""
        return f"; about {duration(sum(self.seconds) / len(self.seconds) * runs / self.jobs)} left"

    def show(self, cell: Cell, record: Mapping[str, Any]) -> None:
        """Print what came of a cell."""
        self.done += 1
        if "error" in record:
            self.failed += 1
            text = f"failed: {record['error']}"
        else:
            first, last = record["points"][0], record["points"][-1]
            measure = self.suite.tasks[cell.task].judged_on
            before, after = number_or_nan(first[measure]), number_or_nan(last[measure])
            minutes = record["total_seconds"] / 60
            text = f"{measure.replace('_', ' ')} {before:.3f} -> {after:.3f}, {minutes:.1f} minutes"
            self.seconds.append(float(record["total_seconds"]))
        print(f"{self.done}/{self.number} {cell.task}, {cell.agent}, seed {cell.seed}: {text}{self.left()}", flush=True)
