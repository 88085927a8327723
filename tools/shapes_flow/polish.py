"""The last stage of `ShapesFlow`: DDPO_IS on captions of one and of two things, by this package's own agent.

What the distilled network gets wrong of one thing is that two places of it melt into one, or two colors; the denoising
loss hardly sees that, the detector does. Relations and numbers are not trained on: they are left to the learner.
Hundreds of prompts at once need what few do not: groups of a prompt as the baseline, pictures noised anew and large
minibatches, without which the same agent forgets more than it learns.
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
_PAIRS: Final = 10  # one in so many captions of two things is trained on; those of one make up a third then


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
    start = starting_point(_ENV, "ddpo_is", "shapes-flow", None)
    settings = replace(
        start,
        env_options=replace(
            start.env_options, model=str(model), prompts=(*colors.prompts, *pairs.prompts[::_PAIRS]), strict=True
        ),
        agent_options=replace(
            start.agent_options,
            renoise=True,
            normalization="group",
            group_size=16,
            batch_size=128,
            inner_epochs=2,
            timestep_fraction=0.6,
            learning_rate=2e-4,
        ),
        samples_per_iteration=256,
        rollout_batch=128,
        out=out,
        seed=seed,
        device=device,
        threads=threads,
        total_reward_queries=queries,
        pictures_every=0,
        resume=(out / "config.json").exists(),
    )
    train(settings)
    transformer = load(out / "model", torch.device("cpu")).unet
    return {f"transformer.{name}": value for name, value in transformer.state_dict().items()}
