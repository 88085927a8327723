"""Do the agents learn? Trains each with several seeds, keeps the numbers, writes the results in docs/agents.md.

    python docs/compare_agents.py run --env DiffusionDenoise-Shapes-Location-v0 --preset shapes-short
    python docs/compare_agents.py page    # charts and table from docs/results/learning/ alone

`run` leaves out what is finished, goes on with what is not, and loses nothing to a run that fails.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, Final

import tyro
from learning_numbers import COMMON, OWN, Measure, number, run_name
from learning_page import write_page

from diffusion_gym.agents.cli import parse_train
from diffusion_gym.agents.report.run import Run
from diffusion_gym.storage import read_json, write_json

ROOT: Final = Path(__file__).resolve().parent.parent
RECORDS: Final = ROOT / "docs" / "results" / "learning"
EVALUATION_SEED: Final = 1_000  # plus the training's seed: other noise for each seed, the same for all agents
PARSING: Final = Lock()  # tyro has a cache that threads must not share


@dataclass(frozen=True)
class RunOptions:
    """Train and evaluate every agent with every seed; finished ones are left out, unfinished ones go on."""

    env: str = "DiffusionDenoise-Shapes-Location-v0"
    """Environment id."""
    preset: str = "shapes-short"
    """Hyperparameters of every agent."""
    agents: str = "ddpo_sf,ddpo_is,ddpo_iskl,dpok,rwr,rwr_sparse"
    """Agents, separated by commas."""
    seeds: str = "0,1,2"
    """Seeds of the trainings, separated by commas."""
    total_reward_queries: int = 3_200
    """Pictures to score in each training."""
    samples: int = 256
    """Pictures of each model in an evaluation."""
    out: Path = Path("runs/compare")
    """Where the run folders and logs go."""
    jobs: int = 1
    """Runs at once."""
    threads: int = 1
    """CPU threads of each run; 0 leaves torch's own choice."""
    records: Path = RECORDS
    """Where the record of each run goes."""


@dataclass(frozen=True)
class PageOptions:
    """Write the charts, and the table and findings of the page, from the records."""

    records: Path = RECORDS
    """The records."""
    page: Path = ROOT / "docs" / "agents.md"
    """The page; what stands between its `learning` markers is written anew."""
    images: Path = ROOT / "docs" / "images"
    """Where the charts go."""


def run(options: RunOptions) -> None:
    """Train, evaluate and record; ends with exit code 1 if a run failed."""
    wanted = [(agent, int(seed)) for agent in options.agents.split(",") for seed in options.seeds.split(",")]
    pool = ThreadPoolExecutor(options.jobs)
    waiting = {run_name(*pair): pool.submit(_one, options, *pair) for pair in wanted}
    failures: dict[str, str] = {}
    try:
        for name, result in waiting.items():
            try:
                print(f"{name}: {result.result()}", flush=True)
            except Exception as error:
                failures[name] = str(error)
                print(f"{name}: failed: {error}", flush=True)
    except KeyboardInterrupt:  # the trainings got it too, and end with a checkpoint
        raise SystemExit("stopped; the same command goes on") from None
    finally:
        pool.shutdown(cancel_futures=True)
        write_json(options.out / "failures.json", failures)
    if failures:
        raise SystemExit(f"{len(failures)} of {len(wanted)} runs failed; logs in {options.out}")


def _one(options: RunOptions, agent: str, seed: int) -> str:
    """Bring one run to its record; returns what to tell about it."""
    folder, target = options.out / run_name(agent, seed), options.records / f"{run_name(agent, seed)}.json"
    arguments = ["--env", options.env, "--agent", agent, "--preset", options.preset, "--seed", str(seed)]
    arguments += ["--total-reward-queries", str(options.total_reward_queries), "--threads", str(options.threads)]
    arguments += ["--pictures-every", "0", "--out", str(folder)]
    with PARSING:
        asked = _description(_json(parse_train(arguments).to_json()), options.samples)
    if target.is_file() and {key: read_json(target).get(key) for key in asked} == asked:
        return "was finished"
    resume = _resumable(folder, asked, options.samples)
    log = options.out / f"{folder.name}.log"
    started = time.perf_counter()
    _call(["train", *(["--resume"] if resume else []), *arguments], options.threads, log)
    if Run.read(folder).metrics[-1]["reward_queries"] < options.total_reward_queries:
        raise RuntimeError("stopped early; the same command goes on")
    evaluation = ["--samples", str(options.samples), "--seed", str(EVALUATION_SEED + seed), "--json"]
    _call(["eval", str(folder), *evaluation], options.threads, log)
    record = make_record(folder, options.samples)
    write_json(target, record)
    measure = Measure.of({agent: [record]})
    minutes = (time.perf_counter() - started) / 60
    return f"{measure.name} {number(measure.before(record))} -> {number(measure.after(record))}, {minutes:.1f} minutes"


def _description(settings: Mapping[str, Any], samples: int) -> dict[str, Any]:
    """What tells a run from others, of the JSON of its settings."""
    keys = ("agent", "seed", *COMMON, *OWN)
    return {key: samples if key == "evaluation_samples" else settings[key] for key in keys}


def _resumable(folder: Path, asked: Mapping[str, Any], samples: int) -> bool:
    """Whether the folder holds a checkpoint of the run that is asked for; clears away one without a checkpoint."""
    if not (folder / "config.json").is_file():
        return False
    found = _description(read_json(folder / "config.json")["settings"], samples)
    if changed := [key for key in asked if found[key] != asked[key]]:
        raise ValueError(f"{folder} holds a run with other {', '.join(changed)}; remove it or choose another --out")
    if any((folder / "checkpoints").glob("*.safetensors")):
        return True
    shutil.rmtree(folder)  # ended before its first checkpoint
    return False


def _call(arguments: Sequence[str], threads: int, log: Path) -> None:
    """Run a command of `diffusion-gym` in a process of its own.

    Raises:
        RuntimeError: it failed; the message is its last line.
    """
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        command = [sys.executable, "-m", "diffusion_gym.agents.cli", *arguments]
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    if code:
        lines = re.split(r"[\r\n]+", log.read_text(errors="replace").strip())
        raise RuntimeError(f"`{arguments[0]}` ended with exit code {code}: {lines[-1]}")


def make_record(folder: Path, samples: int) -> dict[str, Any]:
    """The numbers of a run folder that the page needs, without anything of the machine but its threads."""
    done = Run.read(folder)
    settings = _json(done.settings.to_json())
    evaluation = {key: value for key, value in (done.evaluation or {}).items() if key != "shown"}
    if "held_out" in evaluation:
        parts = evaluation["held_out"].items()
        evaluation["held_out"] = {key: value for key, value in parts if key not in ("prompts", "shown")}
    known = [key for key in ("reward_queries", "reward_mean", "success_mean") if key in done.metrics[0]]
    return {
        **_description(settings, samples),
        "threads": settings["threads"],
        "seconds": round(sum(row["seconds"] for row in done.metrics), 1),
        "versions": dict(done.versions),
        "curve": {key: [row[key] for row in done.metrics] for key in known},
        "evaluation": evaluation,
    }


def _json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def main() -> None:
    """Run a command; a user's mistake ends in one line."""
    run_options = Annotated[RunOptions, tyro.conf.subcommand("run")]
    page_options = Annotated[PageOptions, tyro.conf.subcommand("page")]
    options = tyro.cli(run_options | page_options)
    try:
        if isinstance(options, RunOptions):
            run(options)
        else:
            write_page(options.records, options.page, options.images)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
