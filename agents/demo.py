"""The demonstration: DDPO_IS improves an embedded model in minutes, and a page shows it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from diffusion_gym.agents.report.run import write_report
from diffusion_gym.agents.training import runs
from diffusion_gym.agents.training.evaluation import EVALUATION_SEED, summary_text
from diffusion_gym.agents.training.settings import starting_point

PRESETS: Final = {"Shapes": "shapes-demo", "ShapesFlow": "shapes-flow-demo"}


@dataclass(frozen=True)
class DemoOptions:
    """Fine-tune an embedded model with DDPO_IS, compare before and after, and write a page."""

    model: Literal["Shapes", "ShapesFlow"] = "Shapes"
    """A UNet with DDIM's noise, or a flow-matching transformer with Flow-GRPO's."""

    out: Path | None = None
    """Run folder; by default the first free one of runs/demo-1, runs/demo-2, ..."""
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
    environment, preset = f"DiffusionDenoise-{options.model}-Location-v0", PRESETS[options.model]
    settings = starting_point(environment, "ddpo_is", preset, None)
    settings = replace(
        settings,
        out=options.out or _free_folder(),
        seed=options.seed,
        threads=options.threads,
    )
    if options.total_reward_queries is not None:
        settings = replace(settings, total_reward_queries=options.total_reward_queries)
    print(f"DDPO_IS on {environment}, preset {preset}, seed {settings.seed}, into {settings.out}")
    done, loading = runs.train(settings)
    trained = time.perf_counter()
    if done.reward_queries < settings.total_reward_queries:
        print(f"Stopped early, {runs.how_to_go_on(settings.out)}")
        return
    print(f"Comparing with the pretrained model on {options.samples} fresh samples of each ...")
    result = runs.evaluate_run(settings.out, options.samples, EVALUATION_SEED)
    page = write_report(settings.out)
    minutes, rate = (trained - started) / 60, done.reward_queries / (trained - started)
    print(summary_text(result))
    print(f"{minutes:.1f} minutes of training, {rate:.1f} images/s; {(time.perf_counter() - started) / 60:.1f} in all")
    print(f"In diffusers: {loading}")
    print(f"Report: {page}")


def _free_folder() -> Path:
    number = 1
    while (folder := Path("runs") / f"demo-{number}").exists():
        number += 1
    return folder
