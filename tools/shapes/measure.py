"""How well a `Shapes` model obeys its captions: success rates by family, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.agents.rollout import denoise
from diffusion_gym.config import SamplerConfig
from diffusion_gym.models.base import DenoisingModel
from diffusion_gym.rewards import evaluate, make_reward
from diffusion_gym.shapes.captions import FAMILIES, all_captions

_BATCH = 64


def sample_images(policy: DenoisingPolicy, prompts: Sequence[str], generator: torch.Generator) -> torch.Tensor:
    """One picture a prompt, float `(N, 3, H, W)` in [0, 1]; `generator` is on the policy's device."""
    model = policy.model
    noise = torch.randn(len(prompts), *model.latent_shape, generator=generator, device=policy.device)
    return model.decode(denoise(policy, noise, model.tokenize(prompts), generator))


def success_rates(
    model: DenoisingModel, config: SamplerConfig, samples: int, seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """Strict success of each family over `samples` random captions: (rate, low, high) of the 95 % interval."""
    rates: dict[str, tuple[float, float, float]] = {}
    reward, policy = make_reward("Composition", strict=True), DenoisingPolicy(model, config)
    for index, family in enumerate(FAMILIES):
        captions = [str(caption) for caption in all_captions(family)]
        rng = np.random.default_rng([seed, index])
        generator = torch.Generator(policy.device).manual_seed(seed * 100 + index)
        prompts = [captions[i] for i in rng.integers(len(captions), size=samples)]
        hits = 0.0
        for start in range(0, samples, _BATCH):
            part = prompts[start : start + _BATCH]
            hits += float(evaluate(reward, sample_images(policy, part, generator), part).scores.sum())
        interval = stats.binomtest(int(hits), samples).proportion_ci(0.95, method="wilson")
        rates[family] = (hits / samples, float(interval.low), float(interval.high))
    return rates


def rate_table(model: DenoisingModel, settings: list[tuple[float, int]], samples: int) -> str:
    """A Markdown table of success rates, one row a pair of (guidance scale, T)."""
    lines = ["| guidance | T | " + " | ".join(FAMILIES) + " |", "|---" * (2 + len(FAMILIES)) + "|"]
    for guidance, steps in settings:
        config = SamplerConfig(num_inference_steps=steps, guidance_scale=guidance)
        rates = success_rates(model, config, samples).values()
        cells = [f"{rate:.2f} ({low:.2f} to {high:.2f})" for rate, low, high in rates]
        lines.append(f"| {guidance:g} | {steps} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_model_card(path: Path, table: str, facts: dict[str, str]) -> None:
    """Write `README.md` of the shipped weights: how they were made and what they reach."""
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    path.write_text(
        f"""# Shapes

A text-to-image latent diffusion model in diffusers' `StableDiffusionPipeline` layout, trained from scratch on drawn
scenes of one to four circles, squares, triangles and stars in six colors. It is made for reinforcement-learning
experiments: a detector scores its pictures exactly, and it leaves room for improvement on purpose.

Made by `python -m tools.shapes`; no outside data or weights.

| | |
|---|---|
{rows}

## Strict success

Share of samples in which every fact of the caption holds, over random captions of a family; DDIM with eta 1;
in brackets Wilson's 95 % interval. Measured by the same command.

{table}
""",
        encoding="utf-8",
    )
