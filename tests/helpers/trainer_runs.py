"""Rewards that act on a training in mid-run, and what a run left."""

import os
import signal
from dataclasses import dataclass

import torch

from diffusion_gym.agents.training.checkpoint import Progress
from diffusion_gym.rewards import RewardOutput
from run_folders import metrics_rows

BATCH, SAMPLES = 4, 8


def brightness(images, prompts, metadata):
    scores = images.mean((1, 2, 3))
    return RewardOutput(scores, {"red": images[:, 0].mean((1, 2))})


def when(call, act, reward=brightness):
    """A reward that at its n-th call does something else, once."""
    calls = []

    def scored(images, prompts, metadata):
        calls.append(None)
        if len(calls) == call:
            changed = act(images)
            if changed is not None:
                return changed
        return reward(images, prompts, metadata)

    return scored


def raising(error):
    def act(images):
        raise error

    return act


def interrupt(images):
    os.kill(os.getpid(), signal.SIGINT)


@dataclass(frozen=True)
class Snapshot:
    """All that a run left: metrics without clocks, weights, Adam, statistics, progress."""

    rows: list
    tensors: dict
    state: dict
    done: Progress

    @staticmethod
    def of(trainer):
        tensors = {key: value.clone() for key, value in trainer.agent.tensors().items()}
        return Snapshot(metrics_rows(trainer.out), tensors, trainer.agent.state(), trainer.done)


def same_agent(first, second):
    """Whether two snapshots hold the same agent, bit for bit."""
    a, b = first.tensors, second.tensors
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) and first.state == second.state


def assert_equals(trainer, whole):
    found = Snapshot.of(trainer)
    assert found.rows == whole.rows
    assert same_agent(found, whole)
    assert found.done == whole.done == Progress(4, 4 * SAMPLES)
