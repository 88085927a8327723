"""The last stage of `ShapesFlow`: AWM on captions of one and of two things, by this package's own agent.

What the distilled network gets wrong of one thing is that two places of it melt into one, or two colors; the denoising
loss hardly sees that, the detector does. Relations and numbers are not trained on: they are left to the learner. On
many prompts at once DDPO_IS forgot more than it learned, AWM moves less and stays.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

import torch

from diffusion_gym.agents.training.runs import train
from diffusion_gym.agents.training.settings import starting_point
from diffusion_gym.prompts import make_prompts
from tools.shapes_flow.export import load

_ENV: Final = "DiffusionDenoise-ShapesFlow-Composition-v0"
_COLORS: Final = 9  # times that the captions of one thing are there, which makes them 0.6 of all
_PAIRS: Final = 4  # one in so many captions of two things is trained on


def polish(model: Path, out: Path, *, queries: int, seed: int, device: str, threads: int) -> dict[str, torch.Tensor]:
    """Train the pipeline directory `model`, or go on with the run in `out`; the transformer's weights.

    Args:
        model: of `export`.
        out: the run folder.
        queries: pictures that the detector judges.
        seed: of the training.
        device: to train on.
        threads: OpenMP threads.
    """
    colors, pairs = make_prompts("shapes-color"), make_prompts("shapes-composition")
    start = starting_point(_ENV, "awm", "shapes-flow", None)
    settings = replace(
        start,
        env_options=replace(
            start.env_options,
            model=str(model),
            prompts=(*_COLORS * colors.prompts, *pairs.prompts[::_PAIRS]),
            strict=True,
            eta=0.0,  # Euler's method
            device=device,
        ),
        agent_options=replace(
            start.agent_options,
            batch_size=64,
            timestep_fraction=0.4,
            learning_rate=4e-4,
            learning_rate_schedule="warmup_cosine",
            warmup_fraction=0.02,
            first_learning_rate=1e-5,
            last_learning_rate=1e-5,
            ema_decay=0.9,
        ),
        samples_per_iteration=256,
        rollout_batch=128,
        out=out,
        seed=seed,
        threads=threads,
        total_reward_queries=queries,
        pictures_every=0,
        resume=(out / "config.json").exists(),
    )
    train(settings)
    transformer = load(out / "model", torch.device("cpu")).unet
    return {f"transformer.{name}": value for name, value in transformer.state_dict().items()}
