"""A suite on a tiny pipeline, and hand-made records, for the tests of the benchmark."""

import json
import math
from pathlib import Path

from diffusion_gym.agents.benchmark.records import FORMAT
from diffusion_gym.storage import write_json

HELD_OUT_PROMPTS = "shapes-color-4"

SUITE = """
description = "for tests"
budget = 8
evaluations = 2
samples = 4
batch = 4

[overrides]
samples_per_iteration = 4
rollout_batch = 4
batch_size = 4
updates = 1
value_updates = 1
num_inference_steps = 3
guidance_scale = 2.0
eta = 1.0
learning_rate = 1e-3
clip_range = 0.2
micro_batch_size = 64
trainable = "lora"
max_grad_norm = 1.0
mixed_precision = "no"
gradient_checkpointing = false

[agents.frozen_null]
agent = "ddpo_is"
cfg_training = false

[tasks.size]
env = "DiffusionDenoise-v0"
env_options = {{ model = "{model}", reward = "Incompressibility", prompts = ["shapes-color-4"] }}
ceiling = 1.0
probe = "Compressibility"
"""


def write_suite(folder: Path, model: Path, more: str = "", **changed: str) -> Path:
    """`tiny.toml` in `folder`; `changed` replaces a line `name = ...`, `more` comes after it."""
    lines = SUITE.format(model=model).splitlines()
    for name, value in changed.items():
        lines = [f"{name} = {value}" if line.startswith(f"{name} = ") else line for line in lines]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.toml"
    path.write_text("\n".join(lines) + "\n" + more)
    return path


def write_record(folder: Path, agent: str, task: str, seed: int, base: float, after: float, **measures: float) -> None:
    """A record of two points, the pretrained model's and the last."""
    points = [
        {"reward_queries": 0, "seconds": 0.0, "network_evaluations": 0, "reward": base},
        {"reward_queries": 8, "seconds": 1.0 + seed, "network_evaluations": 48, "reward": after, **measures},
    ]
    record = {
        "format": FORMAT,
        "suite": "tiny",
        "task": task,
        "agent": agent,
        "trained": agent,
        "seed": seed,
        "threads": 1,
        "versions": {},
        "hardware": {},
        "settings": {"total_reward_queries": 8, "env_options": {}, "agent_options": {}},
        "points": points,
        "peak_memory_mb": 700.0,
        "total_seconds": 1.0,
    }
    write_json(folder / "records" / f"{task}--{agent}--seed-{seed}.json", record)


def suite_text(content):
    """A suite as TOML."""

    def value(part):
        if isinstance(part, dict):
            return "{ " + ", ".join(f"{json.dumps(key)} = {value(own)}" for key, own in part.items()) + " }"
        if isinstance(part, list):
            return f"[{', '.join(map(value, part))}]"
        return "nan" if isinstance(part, float) and math.isnan(part) else json.dumps(part)

    return "".join(f"{json.dumps(key)} = {value(part)}\n" for key, part in content.items())
