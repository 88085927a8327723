"""What a number of answers buys: a simulated person labels, a reward is fitted, an agent trains on it.

The person is the detector of the Shapes pictures: of two pictures it chooses the one in which more facts of the caption
hold, says `equal` where as many do, and at a share of the questions gives an answer at random. The agent never sees the
detector: only the evaluation does, by strict success on the prompts, before and after.

    python benchmarks/simulated_labels.py --out runs/labels --seeds 0 1 2

A run folder that is there goes on or is taken as it is; `results.jsonl` has a line a seed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import tyro

from diffusion_gym.agents.label.command import FitOptions, LabelOptions, run_fit, run_label
from diffusion_gym.agents.label.questions import Questions
from diffusion_gym.agents.training import runs
from diffusion_gym.agents.training.checkpoint import Checkpoints
from diffusion_gym.agents.training.evaluation import EVALUATION_SEED, compare
from diffusion_gym.agents.training.settings import RunSettings, make_env, starting_point
from diffusion_gym.rewards import evaluate, make_reward
from diffusion_gym.rewards.preference.labels import Choice, Labels
from diffusion_gym.rewards.preference.reward import PreferenceReward
from diffusion_gym.storage import append_line, exact_json

_ENV: Final = "DiffusionDenoise-Shapes-Location-v0"
_PROMPTS: Final = ("shapes-demo",)
_CHOICES: Final[tuple[Choice, ...]] = ("first", "second", "equal")


@dataclass(frozen=True)
class Options:
    """Label, fit and train with a simulated person."""

    out: Path
    """Folder of the labels and runs."""
    seeds: tuple[int, ...] = (0,)
    """One labelling, fit and training each."""
    answers: int = 300
    """Answers of the person."""
    mistakes: float = 0.1
    """Share of the answers that are given at random."""
    pictures: int = 128
    """Pictures that are labelled."""
    total_reward_queries: int | None = None
    """Pictures scored in training; by default the preset's."""
    samples: int = 256
    """Pictures of each model in the evaluation."""
    preset: str = "fast"
    """Hyperparameters of the training."""
    threads: int = 0
    """CPU threads of torch; 0 leaves torch's own choice."""


class SimulatedPerson:
    """Answers by the detector, with mistakes.

    Args:
        labels: the folder whose pictures are asked about.
        mistakes: share of the answers at random.
        seed: of the mistakes.
    """

    def __init__(self, labels: Labels, mistakes: float, seed: int) -> None:
        names = list(labels.pictures)
        prompts = [labels.pictures[name].prompt for name in names]
        scores = evaluate(make_reward("Location"), labels.images(names), prompts).scores
        self._scores = dict(zip(names, scores.tolist(), strict=True))
        self._mistakes, self._rng = mistakes, np.random.default_rng(seed)

    def __call__(self, first: str, second: str) -> Choice:
        """The answer about two pictures."""
        if self._rng.random() < self._mistakes:
            return _CHOICES[self._rng.integers(3)]
        difference = self._scores[first] - self._scores[second]
        return "first" if difference > 1e-6 else "second" if difference < -1e-6 else "equal"


def label(options: Options, seed: int, folder: Path) -> None:
    """Pictures of the pretrained model with the training's sampler, and the person's answers about them."""
    sampler = starting_point(_ENV, "ddpo_is", options.preset, None).env_options

    def answered(labels: Labels, features: torch.Tensor) -> None:
        person, questions = SimulatedPerson(labels, options.mistakes, seed), Questions(labels, features, seed)
        while len(labels.answers.get("simulated", [])) < options.answers:
            asked = questions.question("simulated")
            questions.answer("simulated", asked.number, person(asked.first, asked.second))

    asked = LabelOptions(
        model="Shapes",
        prompts=_PROMPTS,
        out=folder,
        pictures=options.pictures,
        group=16,
        seed=seed,
        num_inference_steps=sampler.num_inference_steps,
        guidance_scale=sampler.guidance_scale,
    )
    run_label(asked, answered)


def settings_of(options: Options, seed: int, reward: Path, out: Path) -> RunSettings:
    """A training on the fitted reward."""
    settings = starting_point(_ENV, "ddpo_is", options.preset, None)
    env_options = replace(settings.env_options, reward=str(reward), prompts=_PROMPTS, strict=None)
    total = options.total_reward_queries or settings.total_reward_queries
    own = {"out": out, "seed": seed, "threads": options.threads}
    return replace(settings, env_options=env_options, total_reward_queries=total, **own)


def success(run: Path, samples: int) -> dict[str, Any]:
    """Strict success of the run's policy and of the pretrained model, from the same noise, by the detector."""
    settings = runs.load_settings(run)
    judged = replace(settings.env_options, reward=None, strict=True)
    env = make_env(replace(settings, env_options=judged), min(64, samples))
    agent = runs.build_agent(settings, env, from_checkpoint=True)
    done = Checkpoints(run / "checkpoints").load(agent)
    with agent.averaged():
        found = compare(env, agent.policy, samples, EVALUATION_SEED, kl_samples=min(64, samples)).summary()
    kept = ("success", "success_ci95", "base_success", "base_success_ci95", "kl_to_base", "samples")
    return {"reward_queries": done.reward_queries, **{name: found[name] for name in kept}}


def main(options: Options) -> None:
    """All seeds, one after another."""
    for seed in options.seeds:
        started = time.perf_counter()
        labels, run = options.out / f"labels-{seed}", options.out / f"run-{seed}"
        reward = labels / "labels.safetensors"
        label(options, seed, labels)
        run_fit(FitOptions(labels))
        fitted = time.perf_counter()
        settings = settings_of(options, seed, reward, run)
        resumes = bool(Checkpoints(run / "checkpoints").paths())
        runs.train(replace(settings, resume=resumes))
        told = {"seed": seed, "answers": options.answers, "mistakes": options.mistakes, **success(run, options.samples)}
        told |= {"accuracy": PreferenceReward(reward).accuracy, "label_seconds": round(fitted - started, 1)}
        told["seconds"] = round(time.perf_counter() - started, 1)
        append_line(options.out / "results.jsonl", exact_json(told))
        print(f"seed {seed}: success {told['base_success']:.3f} -> {told['success']:.3f}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
