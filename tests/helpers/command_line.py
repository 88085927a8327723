"""Command lines of a small training, and the answer to a mistake."""

import pytest

from diffusion_gym.agents.cli import main

# Of a training of two iterations, each with an evaluation of its development set.
DEVELOPED = {
    "--env": "DiffusionDenoise-v0",
    "--env.reward": "Compressibility",
    "--env.num-inference-steps": 2,
    "--total-reward-queries": 8,
    "--samples-per-iteration": 4,
    "--rollout-batch": 4,
    "--agent.batch-size": 4,
    "--development-samples": 4,
    "--development-every": 1,
    "--track": "none",
}


def train_arguments(tiny_pipeline, out, **extra):
    options = {
        "--env": "DiffusionDenoise-v0",
        "--env.model": str(tiny_pipeline),
        "--env.reward": "Compressibility",
        "--env.num-inference-steps": 2,
        "--env.guidance-scale": 2.0,
        "--out": out,
        "--total-reward-queries": 16,
        "--samples-per-iteration": 8,
        "--rollout-batch": 4,
        "--agent.batch-size": 4,
        **extra,
    }
    arguments = ["train", "--env.prompts", "a red circle", "two blue stars"]
    return arguments + [str(part) for pair in options.items() for part in pair]


def failure(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err
