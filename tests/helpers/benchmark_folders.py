"""Benchmark folders made by hand: records and, where asked for, the samples of the run folders."""

import json
import math
from pathlib import Path

import torch

from diffusion_gym.agents.benchmark.cells import Cell
from diffusion_gym.storage import save_tensors, write_json, write_text

SUITE = """
description = "made by hand"
budget = {budget}
evaluations = 2
samples = 8
batch = 8

[tasks.color]
env = "DiffusionDenoise-Shapes-Color-v0"
ceiling = 1.0
probe = "Incompressibility"

[tasks.size]
env = "DiffusionDenoise-Shapes-Compressibility-v0"
ceiling = 0.0
"""
PROMPTS = ["a red circle", "two blue stars", "<b>bold</b> & co", "a green square"]
COLORS = torch.tensor([[222, 60, 50], [60, 90, 222], [40, 170, 90], [230, 200, 40]], dtype=torch.float32)


def write_suite(folder, budget=64):
    """The suite `made` of the two tasks `color` and `size`."""
    write_text(Path(folder) / "made.toml", SUITE.format(budget=budget))


def write_run(
    folder, agent, task, seed, rewards, *, samples=True, suite="made", settings=None, trained=None, **measures
):
    """A record with a point for each of `rewards`, 32 reward queries apart; a measure is a list, a value for each."""
    points = [
        {
            "reward_queries": 32 * index,
            "seconds": 10.0 * index * (1 + seed / 10),
            "network_evaluations": 640 * index,
            "measuring_seconds": 1.0,
            "reward": reward,
            **{name: values[index] for name, values in measures.items()},
        }
        for index, reward in enumerate(rewards)
    ]
    record = {
        "format": "diffusion-gym-benchmark-1",
        "task": task,
        "agent": agent,
        "seed": seed,
        "threads": 1,
        "versions": {"python": "3.11.7", "torch": "9.8.7"},
        "hardware": {"processor": "a processor", "cores": 2},
        "suite": suite,
        "trained": trained or agent,
        "settings": {
            "total_reward_queries": max(1, 32 * (len(rewards) - 1)),
            "env_options": {},
            "agent_options": {},
            **(settings or {}),
        },
        "points": points,
        "peak_memory_mb": 700.0,
        "total_seconds": 360.0,
    }
    cell = Cell(suite, task, agent, seed, str(folder))
    write_json(cell.record, record)
    if samples:
        for index, reward in enumerate(rewards):
            write_samples(cell, 32 * index, reward, index / max(1, len(rewards) - 1))


def write_failure(folder, agent, task, seed, error="RuntimeError: <no> luck"):
    """The record of a run that failed."""
    cell = Cell("made", task, agent, seed, str(folder))
    record = {**cell.about, "suite": "made", "total_seconds": 2.0}
    write_json(cell.record, {**record, "error": error, "traceback": ["Traceback", error]})


def write_samples(cell, queries, reward, progress, number=24, side=32, steps=10):
    """Pictures whose colours move from their prompt's towards one, and features that draw together, as it goes on."""
    generator = torch.Generator().manual_seed(cell.seed)
    noise = torch.randn((number, 6), generator=generator)
    colors = (1 - progress) * COLORS[torch.arange(number) % 4] + progress * COLORS[0]
    rows = torch.arange(side).float()[:, None, None]
    columns = torch.arange(side).float()[None, :, None]
    middle = side / 2 + noise[:, :2] * 3
    distance = ((rows - middle[:, 0]) ** 2 + (columns - middle[:, 1]) ** 2).sqrt().permute(2, 0, 1)
    disc = (distance < side / 4)[..., None]
    images = torch.where(disc, colors[:, None, None, :], torch.full((3,), 235.0))
    share = torch.linspace(0, 1, steps + 1)[:, None, None, None, None]
    haze = 128 + 60 * torch.randn((1, 4, side, side, 3), generator=generator)
    path = share * images[None, :4] + (1 - share) * haze
    rewards = reward + 0.1 * noise[:, 2]
    along = rewards[None, :4] * torch.linspace(0, 1, steps + 1)[:, None] ** 2
    tensors = {
        "images": images[:16].clamp(0, 255).to(torch.uint8),
        "rewards": rewards,
        "path_images": path.clamp(0, 255).to(torch.uint8),
        "path_rewards": along,
        "features": noise * math.exp(-progress) + progress,
    }
    prompts = json.dumps([PROMPTS[index % 4] for index in range(number)])
    save_tensors(cell.folder / "points" / f"{queries:08d}.safetensors", tensors, {"prompts": prompts})
