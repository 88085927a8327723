"""The demonstration: an agent improves an embedded model in minutes, and a page shows it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from diffusion_gym.agents.report.run import write_report
from diffusion_gym.agents.training import runs
from diffusion_gym.agents.training.evaluation import EVALUATION_SEED, summary_text
from diffusion_gym.agents.training.records import read_metrics
from diffusion_gym.agents.training.settings import RunSettings, starting_point

_AGAIN: Final = "the same command goes on where it stopped"
# Agent and preset of an embedded model.
RECIPES: Final = {"Shapes": ("awm", "fast-demo"), "ShapesFlow": ("ddpo_is", "shapes-flow-demo")}


@dataclass(frozen=True)
class DemoOptions:
    """Fine-tune an embedded model, compare before and after, and write a page."""

    model: Literal["Shapes", "ShapesFlow"] = "Shapes"
    """A UNet, by Advantage Weighted Matching; or a flow-matching transformer, by DDPO_IS with Flow-GRPO's noise."""

    out: Path | None = None
    """Run folder; by default the first of runs/demo-1, runs/demo-2, ... that is free or has this demo unfinished."""
    seed: int = 0
    """Seed of the training."""
    total_reward_queries: int | None = None
    """Pictures to score in training; by default the preset's."""
    samples: int = 256
    """Pictures of each model in the comparison."""
    threads: int = 0
    """CPU threads of torch; 0 leaves torch's own choice."""


def run_demo(options: DemoOptions) -> None:
    """Train, evaluate and report; prints the numbers and where the page is."""
    started = time.perf_counter()
    environment, (agent, preset) = f"DiffusionDenoise-{options.model}-Location-v0", RECIPES[options.model]
    settings = starting_point(environment, agent, preset, None)
    settings = replace(settings, seed=options.seed, threads=options.threads)
    if options.total_reward_queries is not None:
        settings = replace(settings, total_reward_queries=options.total_reward_queries)
    settings = replace(settings, out=options.out or _folder(settings))
    if _unfinished(settings, settings.out):
        settings = replace(runs.load_settings(settings.out), threads=options.threads, resume=True)
    before = len(read_metrics(settings.out / "metrics.jsonl")) if settings.resume else 0
    verb = "again, going on with" if before else "into"
    print(f"{agent} on {environment}, preset {preset}, seed {settings.seed}, {verb} {settings.out}", flush=True)
    try:
        done, loading = runs.train(settings)
    except KeyboardInterrupt as error:
        error.__notes__ = [_AGAIN]  # that of a run would not come to the page
        raise
    trained = time.perf_counter()
    if done.reward_queries < settings.total_reward_queries:
        print(f"Stopped early; {_AGAIN}")
        return
    print(f"Comparing with the pretrained model on {options.samples} fresh samples of each ...")
    result = runs.evaluate_run(settings.out, options.samples, EVALUATION_SEED)
    page = write_report(settings.out)
    print(summary_text(result))
    if before:
        print(f"{(time.perf_counter() - started) / 60:.1f} minutes since iteration {before}")
    else:
        minutes, in_all = ((until - started) / 60 for until in (trained, time.perf_counter()))
        print(f"{minutes:.1f} minutes until trained; {in_all:.1f} in all")
    print(f"In diffusers: {loading}")
    print(f"Report: {page}")


def _folder(settings: RunSettings) -> Path:
    """The first numbered folder that is free, or in which this demo was stopped."""
    number = 1
    while (folder := Path("runs") / f"demo-{number}").exists() and not _unfinished(settings, folder):
        number += 1
    return folder


def _unfinished(settings: RunSettings, folder: Path) -> bool:
    """Whether a folder holds a run of these settings, in training or not, that has no page yet."""
    if not (folder / "config.json").is_file() or (folder / "report.html").exists():
        return False
    try:
        stored = runs.read_settings(folder)
    except ValueError:  # of something else, or of another version
        return False
    return replace(stored, threads=settings.threads).to_json() == settings.to_json()
