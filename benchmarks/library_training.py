"""One training of libraries.py, in a process of its own: by the native agent, Stable-Baselines3 or Tianshou.

All take their hyperparameters from the same preset of `ddpo_is`. The record has what the page needs.
"""

from __future__ import annotations

import platform
import resource
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import tyro

from diffusion_gym.agents.benchmark.contender import Contender, LibraryContender
from diffusion_gym.agents.benchmark.contenders import make_contender
from diffusion_gym.agents.evaluation import compare
from diffusion_gym.agents.settings import RunSettings, make_env, starting_point
from diffusion_gym.agents.trainer import read_metrics
from diffusion_gym.storage import write_json

EVALUATION_SEED: Final = 1_000  # plus the training's seed: other noise for each seed, the same for all libraries
VERSIONS: Final = ("diffusion-denoise-gym", "torch", "gymnasium", "diffusers", "stable-baselines3", "tianshou")
TRAININGS: Final = {
    "native": "ddpo_is",
    "sb3_ppo": "sb3/ppo",
    "sb3_ddpoppo": "sb3/ddpo_ppo",
    "tianshou_ppo": "tianshou/ppo",
}


@dataclass(frozen=True)
class Training:
    """What one run is, as its record tells it."""

    library: str = "native"
    """A key of `TRAININGS`."""
    seed: int = 0
    """Seed of the training."""
    env: str = "DiffusionDenoise-Shapes-Location-v0"
    """Environment id."""
    preset: str = "shapes-short"
    """Where the hyperparameters come from: those of `ddpo_is`."""
    total_reward_queries: int = 3_200
    """Pictures to score; a multiple of the preset's samples an iteration."""
    evaluation_samples: int = 256
    """Pictures of each model after training."""
    threads: int = 1
    """CPU threads."""

    def settings(self) -> RunSettings:
        """The hyperparameters.

        Raises:
            ValueError: an unknown preset, or a budget that is not whole iterations.
        """
        found = starting_point(self.env, "ddpo_is", self.preset, None)
        if self.total_reward_queries % found.samples_per_iteration:
            raise ValueError(
                f"total_reward_queries={self.total_reward_queries} must be a multiple of "
                f"samples_per_iteration={found.samples_per_iteration} of preset {self.preset!r}"
            )
        return replace(found, total_reward_queries=self.total_reward_queries, seed=self.seed)


def measure(training: Training) -> dict[str, Any]:
    """Train, evaluate, and tell.

    Raises:
        RuntimeError: the library asked for more or fewer rewards than it was given.
    """
    settings = training.settings()
    torch.set_num_threads(training.threads)
    torch.manual_seed(settings.seed)
    with tempfile.TemporaryDirectory() as folder:
        quiet = replace(settings, out=Path(folder), checkpoint_every=10**9, pictures_every=0)
        contender = make_contender(TRAININGS[training.library], quiet)
        started, cpu, at_start = time.perf_counter(), time.process_time(), _peak_mb()
        contender.train_until(training.total_reward_queries)
        seconds, cpu, peak = time.perf_counter() - started, time.process_time() - cpu, _peak_mb()
        curve = _curve(contender, quiet)
    if contender.reward_queries != training.total_reward_queries:
        raise RuntimeError(f"{contender.reward_queries} pictures were scored, not {training.total_reward_queries}")
    env = make_env(settings, 64)
    evaluated = compare(env, contender.policy, training.evaluation_samples, EVALUATION_SEED + settings.seed)
    return {
        **vars(training),
        "settings": {key: value for key, value in settings.to_json().items() if key not in ("out", "seed", "threads")},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in VERSIONS}},
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "start_mb": round(at_start),
        "peak_mb": round(peak),
        "curve": [round(value, 4) for value in curve],
        "evaluation": evaluated.summary(),
    }


def _curve(contender: Contender, settings: RunSettings) -> list[float]:
    """The mean reward of each iteration."""
    if isinstance(contender, LibraryContender):
        return np.array(contender.env.rewards).reshape(-1, settings.samples_per_iteration).mean(1).tolist()
    return [row["reward_mean"] for row in read_metrics(settings.out / "metrics.jsonl")]


def _peak_mb() -> float:
    """The largest resident memory of this process so far, MiB; the system counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2 ** (20 if sys.platform == "darwin" else 10)


def main(training: Training, out: Path) -> None:
    """Train once.

    Args:
        training: the run.
        out: where its record goes.
    """
    write_json(out, measure(training))


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,))
