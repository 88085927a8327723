"""What the tests read from run folders, and how they compare runs."""

import json
from dataclasses import fields

from diffusion_gym.agents.algorithms import AGENTS
from diffusion_gym.agents.training.env_options import EnvOptions
from diffusion_gym.agents.training.runs import write_config
from diffusion_gym.agents.training.settings import RunSettings, starting_point

CLOCKS = {"seconds", "rollout_seconds", "images_per_second"}
BENCHMARK_CLOCKS = {"seconds", "cpu_seconds", "measuring_seconds", "total_seconds", "peak_memory_mb"}

# A short training that tests break off: its length, and prompts enough for statistics to differ.
ITERATIONS, SAMPLES = 6, 8
PROMPTS = ("a red circle", "two blue stars", "a green square", "three circles", "a yellow star")

# Everything that an agent may carry from one iteration to the next is switched on; an agent takes what it has.
CARRYING_OPTIONS = {
    "learning_rate": 1e-3,
    "learning_rate_schedule": "warmup_cosine",
    "first_learning_rate": 1e-4,
    "ema_decay": 0.8,
    "timestep_fraction": 0.67,
    "normalization": "prompt",
    "statistics_buffer": 6,
    "statistics_min_count": 2,
    "updates": 2,
    "clip_range": 0.2,
    "value_batch_size": 12,
    "value_updates": 1,
    "percentile": 0.5,
    "behaviour_growth": 0.1,
}

DIFFERENTIABLE = "diffusion_gym.testing.brightness:Brightness"


def reward_for(agent, other):
    """The reward `other`, or one with a gradient for the agent that follows it."""
    return DIFFERENTIABLE if agent == "reward_gradient" else other


def carrying_arguments(pipeline, agent, out, **options):
    """The command line of such a training by an agent, `CARRYING_OPTIONS` and `options` switched on as it has them."""
    known = {entry.name for entry in fields(AGENTS[agent].Config)}
    carrying = {
        **CARRYING_OPTIONS,
        "trainable": "lora",
        "lora_rank": 4,
        "group_size": 2,
        "batch_size": 4,
        "replay_iterations": 2,
        **options,
    }
    chosen = {
        "--env": "DiffusionDenoise-v0",
        "--env.model": pipeline,
        "--env.reward": reward_for(agent, "Compressibility"),
        "--env.num-inference-steps": 3,
        "--env.guidance-scale": 2.0,
        "--agent": agent,
        "--out": out,
        "--threads": 1,
        "--total-reward-queries": ITERATIONS * SAMPLES,
        "--samples-per-iteration": SAMPLES,
        "--rollout-batch": 4,
        **{f"--agent.{key.replace('_', '-')}": value for key, value in carrying.items() if key in known},
    }
    return ["train", "--env.prompts", *PROMPTS, *(str(part) for pair in chosen.items() for part in pair)]


def timeless(value, clocks=BENCHMARK_CLOCKS):
    """JSON without what a clock gave, at any depth."""
    if isinstance(value, dict):
        return {key: timeless(part, clocks) for key, part in value.items() if key not in clocks}
    return [timeless(part, clocks) for part in value] if isinstance(value, list) else value


def metrics_lines(folder):
    path = folder / "metrics.jsonl"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def metrics_rows(folder):
    """The records of a run's metrics, without what the clock gave."""
    records = [json.loads(line) for line in metrics_lines(folder)]
    return [{key: value for key, value in record.items() if key not in CLOCKS} for record in records]


def file_names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def made_here(folder, **env_options):
    """A run folder as this user's training leaves it, without a checkpoint."""
    settings = starting_point("DiffusionDenoise-Shapes-Color-v0", "ddpo_is", None, None)
    write_config(RunSettings(**{**vars(settings), "out": folder, "env_options": EnvOptions(**env_options)}))
    return folder
