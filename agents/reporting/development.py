"""The development set on a run's page: its reward over the training, along the trajectories, and the last sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_gym.agents.records import read_development
from diffusion_gym.agents.reporting.charts import Curve, line_chart
from diffusion_gym.agents.reporting.markup import Html, element, picture
from diffusion_gym.agents.reporting.results import number, percent
from diffusion_gym.storage import number_or_nan


def development_section(folder: Path) -> Html:
    """The section of a run folder; empty for a run without a development set.

    Args:
        folder: the run folder.
    """
    rows = read_development(folder / "development.jsonl")
    if not rows:
        return Html()
    last = rows[-1]
    text = (
        f"The same noises at every evaluation. At iteration {last['iteration']} their reward is "
        f"{number(last['reward_mean'])}, the pretrained model's {number(last['base_reward_mean'])}; "
        f"{percent(last['improved'])} of the pictures score higher than before."
    )
    parts = [element("h2", "Development set"), element("p", text, class_="muted")]
    parts.append(element("div", _over_training(rows), _along(last), class_="charts"))
    sheet = folder / "images" / f"development-{last['iteration']:06d}.png"
    if sheet.is_file():
        caption = "Pairs: the pretrained model's picture and the current one, with both rewards"
        parts.append(picture(sheet, f"Sheet of the development set at iteration {last['iteration']}", caption))
    return element("section", *parts)


def _over_training(rows: Sequence[Mapping[str, Any]]) -> Html:
    queries = [0.0, *(row["reward_queries"] for row in rows)]
    base = number_or_nan(rows[-1]["base_reward_mean"])
    rewards = [base, *(number_or_nan(row["reward_mean"]) for row in rows)]
    curve = Curve("reward", queries, rewards, level=base if math.isfinite(base) else None, smooth=False)
    return line_chart(
        "Reward of the development set",
        "reward queries (images scored)",
        "mean reward",
        [curve],
        height=220,
        zero=False,
    )


def _along(row: Mapping[str, Any]) -> Html:
    if not row["reward_path"]:
        return Html()
    steps = list(range(len(row["reward_path"])))
    curves = [
        Curve(name, steps, [number_or_nan(value) for value in row[key]], color, smooth=False, dots=False)
        for name, key, color in (("pretrained", "base_reward_path", "second dashed"), ("now", "reward_path", "first"))
    ]
    title = "Reward along the trajectory"
    return line_chart(title, "denoising steps done", "reward of the denoised estimate", curves, height=220, zero=False)
