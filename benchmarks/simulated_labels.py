"""What a number of answers buys: a simulated person labels, a reward is fitted, an agent trains on it.

The person is the detector of the Shapes pictures: of two pictures it chooses the one in which more facts of the caption
hold, says `equal` where as many do, and at a share of the questions gives an answer at random. The agent never sees the
detector: only the evaluation does, by strict success on the prompts, before and after.

    python benchmarks/simulated_labels.py --out runs/labels --seeds 0 1 2

The agent is sparse RWR: it learns from the tenth of its own pictures that the fitted reward likes best. A policy
gradient goes wherever a reward of 300 answers is wrong (`--agent ddpo_is --preset fast`), a choice among the pictures
that the model makes anyway does not.

With several `--rounds` it goes on in one folder of labels: after the first, the pictures are those of the round before,
whose weights the training goes on from. A run folder that is there goes on or is taken as it is; `results.jsonl` has a
line a round.
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
    rounds: int = 1
    """Rounds of label, fit and train."""
    answers: int = 300
    """Answers of the person in all rounds together, a multiple of their number."""
    mistakes: float = 0.1
    """Share of the answers that are given at random."""
    pictures: int = 128
    """Pictures that are made in a round to be labelled."""
    agent: str = "rwr_sparse"
    """The agent that trains on the fitted reward."""
    preset: str = "shapes-labels"
    """Hyperparameters of the training."""
    total_reward_queries: int = 2560
    """Pictures scored in the training of a round."""
    pessimism: float = 1.0
    """Of the fitted reward: standard deviations taken off the score."""
    samples: int = 256
    """Pictures of each model in the evaluation."""
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


def label(options: Options, seed: int, folder: Path, answers: int, run: Path | None) -> None:
    """Pictures of a run, or of the pretrained model with the training's sampler, and answers up to so many."""

    def answered(labels: Labels, features: torch.Tensor) -> None:
        person, questions = SimulatedPerson(labels, options.mistakes, seed + answers), Questions(labels, features, seed)
        while len(labels.answers.get("simulated", [])) < answers:
            asked = questions.question("simulated")
            questions.answer("simulated", asked.number, person(asked.first, asked.second))

    begun = LabelOptions(out=folder, pictures=options.pictures, group=16, seed=seed)
    if run is not None:
        run_label(replace(begun, run=run), answered)
        return
    sampler = starting_point(_ENV, options.agent, options.preset, None).env_options
    pretrained = replace(
        begun,
        model="Shapes",
        prompts=_PROMPTS,
        num_inference_steps=sampler.num_inference_steps,
        guidance_scale=sampler.guidance_scale,
    )
    run_label(pretrained, answered)


def settings_of(options: Options, seed: int, reward: Path, out: Path, before: Path | None) -> RunSettings:
    """A training on the fitted reward, from the weights of the round before."""
    settings = starting_point(_ENV, options.agent, options.preset, None)
    pessimistic = {"pessimism": str(options.pessimism)}
    env_options = replace(
        settings.env_options, reward=str(reward), reward_kwargs=pessimistic, prompts=_PROMPTS, strict=None
    )
    begin = None if before is None else str(before / "model")
    own = {"out": out, "seed": seed, "threads": options.threads, "total_reward_queries": options.total_reward_queries}
    agent_options = replace(settings.agent_options, init_from=begin)
    return replace(settings, env_options=env_options, agent_options=agent_options, **own)


def success(run: Path, samples: int) -> dict[str, Any]:
    """Strict success of the run's policy and of the pretrained model, from the same noise, by the detector."""
    settings = runs.load_settings(run)
    judged = replace(settings.env_options, reward=None, reward_kwargs={}, strict=True)
    env = make_env(replace(settings, env_options=judged), min(64, samples))
    agent = runs.build_agent(settings, env, from_checkpoint=True)
    done = Checkpoints(run / "checkpoints").load(agent)
    with agent.averaged():
        found = compare(env, agent.policy, samples, EVALUATION_SEED, kl_samples=min(64, samples)).summary()
    kept = ("success", "success_ci95", "base_success", "base_success_ci95", "kl_to_base", "samples")
    return {"reward_queries": done.reward_queries, **{name: found[name] for name in kept}}


def main(options: Options) -> None:
    """All seeds, one after another."""
    if options.answers % options.rounds:
        raise ValueError(f"answers={options.answers} must be a multiple of rounds={options.rounds}")
    for seed in options.seeds:
        before = None
        for number in range(1, options.rounds + 1):
            before = one_round(options, seed, number, before)


def one_round(options: Options, seed: int, number: int, before: Path | None) -> Path:
    """Label, fit, train and judge; the run's folder."""
    started = time.perf_counter()
    folder = options.out / f"seed-{seed}"
    labels, run, reward = folder / "labels", folder / f"run-{number}", folder / f"labels-{number}.safetensors"
    answers = options.answers // options.rounds * number
    label(options, seed, labels, answers, before)
    run_fit(FitOptions(labels, out=reward))
    fitted = time.perf_counter()
    settings = settings_of(options, seed, reward, run, before)
    runs.train(replace(settings, resume=bool(Checkpoints(run / "checkpoints").paths())))
    told = {"seed": seed, "round": number, "answers": answers, "mistakes": options.mistakes}
    told |= {**success(run, options.samples), "accuracy": PreferenceReward(reward).accuracy}
    told |= {"label_seconds": round(fitted - started, 1), "seconds": round(time.perf_counter() - started, 1)}
    append_line(options.out / "results.jsonl", exact_json(told))
    print(f"seed {seed}, {answers} answers: {told['base_success']:.3f} -> {told['success']:.3f}", flush=True)
    return run


if __name__ == "__main__":
    main(tyro.cli(Options))
