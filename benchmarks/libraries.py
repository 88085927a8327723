"""Does a library train as the native agent does? Reward, seconds and peak memory of each, at equal reward queries.

    python benchmarks/libraries.py run
    python benchmarks/libraries.py page    # docs/libraries.md and the README, from docs/results/libraries/ alone

`run` leaves out what is finished, and loses nothing to a run that fails. It needs the extras `sb3` and `tianshou`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import tyro
from library_page import write_pages
from library_training import TRAININGS, Training

from diffusion_gym.registry import unknown_name
from diffusion_gym.storage import read_json, write_json

ROOT: Final = Path(__file__).resolve().parent.parent
RECORDS: Final = ROOT / "docs" / "results" / "libraries"


@dataclass(frozen=True)
class RunOptions:
    """Train and evaluate with every library and seed, each in a process of its own."""

    libraries: str = ",".join(TRAININGS)
    """Which, separated by commas."""
    seeds: str = "0,1,2,3,4"
    """Seeds of the trainings, separated by commas."""
    env: str = Training.env
    """Environment id."""
    preset: str = Training.preset
    """Hyperparameters of `ddpo_is` for all."""
    total_reward_queries: int = Training.total_reward_queries
    """Pictures to score in each training."""
    evaluation_samples: int = Training.evaluation_samples
    """Pictures of each model after training."""
    jobs: int = 2
    """Runs at once."""
    threads: int = Training.threads
    """CPU threads of each run."""
    records: Path = RECORDS
    """Where the record of each run goes."""
    logs: Path = Path("runs/libraries")
    """Where what each run prints goes, and `failures.json`."""

    def trainings(self) -> list[Training]:
        """The runs, those of one seed after those of another.

        Raises:
            ValueError: an unknown library or preset, or a budget that is not whole iterations.
        """
        libraries = self.libraries.split(",")
        for name in libraries:
            if name not in TRAININGS:
                raise ValueError(unknown_name("library", name, list(TRAININGS)))
        common = {name: getattr(self, name) for name in vars(Training()) if name not in ("library", "seed")}
        found = [Training(name, int(seed), **common) for seed in self.seeds.split(",") for name in libraries]
        found[0].settings()
        return found


@dataclass(frozen=True)
class PageOptions:
    """Write the table and what it says."""

    records: Path = RECORDS
    """The records."""
    page: Path = ROOT / "docs" / "libraries.md"
    """The page; what stands between its `libraries` markers is written anew."""
    readme: Path = ROOT / "README.md"
    """Gets the table in short, in the same way."""


def run(options: RunOptions) -> None:
    """Train, evaluate and record; ends with exit code 1 if a run failed."""
    trainings = options.trainings()
    failures: dict[str, str] = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        waiting = {name_of(training): pool.submit(_one, training, options) for training in trainings}
        for name, result in waiting.items():
            try:
                print(f"{name}: {result.result()}", flush=True)
            except (RuntimeError, OSError, ValueError) as error:
                failures[name] = str(error)
                print(f"{name}: failed: {error}", flush=True)
    write_json(options.logs / "failures.json", failures)
    if failures:
        raise SystemExit(f"{len(failures)} of {len(trainings)} runs failed; logs in {options.logs}")


def name_of(training: Training) -> str:
    """What the record and the log of a run are called."""
    return f"{training.library}-seed-{training.seed}"


def _one(training: Training, options: RunOptions) -> str:
    """Bring one run to its record; returns what to tell about it.

    Raises:
        RuntimeError: it failed; the message is its last line.
    """
    target, log = (folder / name_of(training) for folder in (options.records, options.logs))
    target, log = target.with_suffix(".json"), log.with_suffix(".log")
    if target.is_file() and _is_of(read_json(target), training):
        return "was finished"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(Path(__file__).with_name("library_training.py")), "--out", str(target)]
    for name, value in vars(training).items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(training.threads)}
    with log.open("wb") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    if code:
        lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
        raise RuntimeError(f"exit code {code}: {lines[-1]}")
    record = read_json(target)
    ends = record["evaluation"]["base_reward_mean"], record["evaluation"]["reward_mean"]
    return f"reward {ends[0]:.3f} -> {ends[1]:.3f}, {record['seconds']:.0f} s, {record['peak_mb']} MB"


def _is_of(record: dict[str, Any], training: Training) -> bool:
    """Whether a record is that of this run."""
    return {key: record.get(key) for key in vars(training)} == vars(training)


def main() -> None:
    """Run a command; a user's mistake ends in one line."""
    run_options = Annotated[RunOptions, tyro.conf.subcommand("run")]
    page_options = Annotated[PageOptions, tyro.conf.subcommand("page")]
    options = tyro.cli(run_options | page_options)
    try:
        if isinstance(options, RunOptions):
            run(options)
        else:
            write_pages(options.records, options.page, options.readme)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
