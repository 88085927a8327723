"""The development set on a run's page: its reward over the training, along the trajectories, and the last pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from diffusion_gym.agents.report.charts import Chart, Curve, line_chart
from diffusion_gym.agents.report.render import Picture, pair
from diffusion_gym.agents.training.development import read_original
from diffusion_gym.agents.training.pictures import sheet_pairs
from diffusion_gym.agents.training.records import read_development
from diffusion_gym.storage import number_or_nan


def development(folder: Path, *, strict: bool = False) -> dict[str, Any] | None:
    """The last record of a run's development set, its charts, and its last pictures; None for a run without one.

    Args:
        folder: the run folder.
        strict: whether a reward of 1 is a success, and any other none.
    """
    rows = read_development(folder / "development.jsonl")
    if not rows:
        return None
    last = rows[-1]
    sheet = folder / "images" / f"development-{last['iteration']:06d}.png"
    content: dict[str, Any] = {
        "last": last,
        "charts": [_over_training(rows), *_along(last), *_probes(rows)],
        "pairs": [],
        "sheet": None,
    }
    if sheet.is_file():
        if "rewards" in last and (folder / "development.safetensors").is_file():
            content["pairs"] = _pairs(sheet, folder / "development.safetensors", last["rewards"], strict=strict)
        else:  # of a run that has kept the means alone
            alt = f"Sheet of the development set at iteration {last['iteration']}"
            content["sheet"] = Picture.of(sheet.read_bytes(), alt)
    return content


def _over_training(rows: Sequence[Mapping[str, Any]]) -> Chart:
    queries = [0.0, *(row["reward_queries"] for row in rows)]
    base = number_or_nan(rows[-1]["base_reward_mean"])
    rewards = [base, *(number_or_nan(row["reward_mean"]) for row in rows)]
    curve = Curve("reward", queries, rewards, level=base if math.isfinite(base) else None, smooth=False)
    return line_chart("Reward of the development set", "reward queries (images scored)", "mean reward", [curve])


def _along(row: Mapping[str, Any]) -> list[Chart]:
    if not row["reward_path"]:
        return []
    steps = list(range(len(row["reward_path"])))
    before, after = ([number_or_nan(value) for value in row[key]] for key in ("base_reward_path", "reward_path"))
    curves = [
        Curve("pretrained", steps, before, "series-2", dashed=True, smooth=False, dots=False),
        Curve("now", steps, after, smooth=False, dots=False),
    ]
    label = "reward of the denoised estimate"
    return [line_chart("Reward along the trajectory", "denoising steps done", label, curves)]


def _probes(rows: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Rewards that are not trained on, over the training."""
    charts = []
    for name in (key.removeprefix("probe_") for key in rows[-1] if key.startswith("probe_")):
        base = number_or_nan(rows[-1].get(f"base_probe_{name}"))
        values = [base, *(number_or_nan(row.get(f"probe_{name}")) for row in rows)]
        queries = [0.0, *(row["reward_queries"] for row in rows)]
        curve = Curve(name, queries, values, level=base if math.isfinite(base) else None, smooth=False)
        title = f"{name}, not trained on"
        charts.append(line_chart(title, "reward queries (images scored)", f"mean {name}", [curve]))
    return charts


def _pairs(sheet: Path, originals: Path, rewards: Sequence[float | None], *, strict: bool) -> list[dict[str, Any]]:
    stored = read_original(originals)
    prompts, before = stored.prompts, stored.rewards.tolist()
    if not len(prompts) == len(rewards) == len(stored.images) == len(before):
        raise ValueError(
            f"{originals} is of other pictures than the {len(rewards)} rewards beside it; delete it to have the "
            "pretrained model sampled again"
        )
    pairs = sheet_pairs(Image.open(sheet), stored.images[0], len(prompts))
    return [
        pair(prompt, images, [first, number_or_nan(last)], (first, last) if strict else (None, None))
        for prompt, images, first, last in zip(prompts, pairs, before, rewards, strict=True)
    ]
