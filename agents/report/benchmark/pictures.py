"""Pictures of a benchmark: before and after, over the training, and along trajectories, always from the same noise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Final

import torch

from diffusion_gym.agents.report.benchmark.data import Benchmark, Samples
from diffusion_gym.agents.report.benchmark.figures import Figures
from diffusion_gym.agents.report.charts import Curve, line_chart
from diffusion_gym.agents.report.numbers import number
from diffusion_gym.agents.report.render import Picture, pair, spread, to_image
from diffusion_gym.agents.training.pictures import grid, png_bytes

_PAIRS: Final = 8  # samples before and after
_ROLLS: Final = 4  # samples over the training
_COLUMNS: Final = 8  # pictures beside each other
_ROLL_WIDTH: Final = 900  # pixels at most, or a benchmark of large pictures would make a page of many megabytes


def pictures(benchmark: Benchmark, figures: Figures) -> dict[str, list[dict[str, Any]]]:
    """For each task and agent the pictures of one seed; empty where the run folders are not there."""
    pictures = {
        task: [_agent(benchmark, figures, task, agent) for agent in benchmark.agents_of(task)]
        for task in benchmark.tasks
    }
    return {task: rows for task, shown in pictures.items() if (rows := [part for part in shown if part])}


def _agent(benchmark: Benchmark, figures: Figures, task: str, agent: str) -> dict[str, Any]:
    seed, name = benchmark.shown_seed(agent, task), f"{task}--{agent}"
    entries = [entry for entry in benchmark.samples(agent, task, seed) if entry.tensor("images") is not None]
    if len(entries) < 2:
        return {}
    return {
        "agent": agent,
        "seed": seed,
        "measured": benchmark.summary["agents"][agent]["tasks"][task],
        **_before_after(figures, name, entries, strict="success" in benchmark.measures(task)),
        **_over_training(figures, name, entries),
        **_trajectories(figures, name, entries[0], entries[-1]),
    }


def _before_after(figures: Figures, name: str, entries: Sequence[Samples], *, strict: bool) -> dict[str, Any]:
    """Pairs, the pretrained model's picture on the left; a reward of 0 and 1 alone says which are strict successes."""
    both = (entries[0], entries[-1])
    before, after = (_tensor(entry, "images")[:_PAIRS] for entry in both)
    rewards = torch.stack([_tensor(entry, "rewards") for entry in both], 1).tolist()
    strict = strict and {value for values in rewards for value in values} <= {0.0, 1.0}
    pairs = [
        pair(prompt, [to_image(first), to_image(last)], values, values if strict else (None, None))
        for prompt, first, last, values in zip(entries[0].prompts, before, after, rewards, strict=False)
    ]
    file = figures.picture(f"before-after--{name}", png_bytes(grid(torch.stack([before, after], 1).flatten(0, 1), 4)))
    return {"pairs": pairs, "pairs_file": file}


def _over_training(figures: Figures, name: str, entries: Sequence[Samples]) -> dict[str, Any]:
    """The same noise at each measurement (thesis, figure 5.4)."""
    chosen = [entries[index] for index in spread(len(entries), _COLUMNS)]
    images = torch.stack([_tensor(entry, "images")[:_ROLLS] for entry in chosen], 1)
    rewards = torch.stack([_tensor(entry, "rewards") for entry in chosen], 1)
    queries = [f"{entry.reward_queries:,}" for entry in chosen]
    rolls = [
        _roll(strip, queries, values.tolist(), prompt)
        for strip, values, prompt in zip(images, rewards, chosen[0].prompts, strict=False)
    ]
    file = figures.picture(f"over-training--{name}", png_bytes(grid(images.flatten(0, 1), len(chosen))))
    return {"rolls": rolls, "rolls_file": file}


def _trajectories(figures: Figures, name: str, first: Samples, last: Samples) -> dict[str, Any]:
    """Denoised estimates x0~ of the lowest and the highest reward, and the rewards on the way (figures 4.3, 4.4)."""
    if any(entry.tensor(key) is None for entry in (first, last) for key in ("path_images", "path_rewards")):
        return {"paths": []}
    rolls, rows, strips, curves = [], [], [], []
    for model, ink, entry in (("pretrained", "series-2", first), ("tuned", "series-1", last)):
        images, rewards = _tensor(entry, "path_images"), _tensor(entry, "path_rewards")
        shown, final = spread(len(images), _COLUMNS), rewards[-1].nan_to_num(-math.inf)
        for sample in sorted({int(final.argmin()), int(final.argmax())}, key=lambda index: float(final[index])):
            strips.append(images[shown, sample])
            caption = f"{model}: {entry.prompts[sample]}"
            rolls.append(_roll(strips[-1], shown, rewards[shown, sample].tolist(), caption))
        steps, along = list(range(len(rewards))), rewards.double()
        rows += [
            {"model": model, "sample": sample, "step": step, "reward": float(rewards[step, sample])}
            for sample in range(rewards.shape[1])
            for step in steps
        ]
        band = [(float(row.min()), float(row.max())) for row in along]
        curves.append(Curve(model, steps, along.nanmean(1).tolist(), ink, band=band, smooth=False, dots=False))
    label = f"mean of {len(rewards[0])} pictures, bands from lowest to highest"
    chart = line_chart("Reward of the denoised estimate", "denoising steps done", label, curves)
    return {
        "paths": rolls,
        "paths_file": figures.picture(f"trajectories--{name}", png_bytes(grid(torch.cat(strips), len(strips[0])))),
        "paths_figure": figures.chart(f"trajectory-rewards--{name}", chart, rows),
    }


def _roll(images: torch.Tensor, above: Iterable[object], rewards: Iterable[float], caption: str) -> dict[str, Any]:
    """Pictures, uint8 `(N, H, W, 3)`, beside each other with a label above and a reward below each."""
    strip = Picture.of(png_bytes(grid(images, len(images))), caption, _ROLL_WIDTH)
    return {"above": list(above), "strip": strip, "below": [number(reward) for reward in rewards]}


def _tensor(entry: Samples, name: str) -> torch.Tensor:
    tensor = entry.tensor(name)
    if tensor is None:
        raise ValueError(f"{entry.path} lacks {name}; run the cell again")
    return tensor
