"""How well a `Shapes` model obeys its captions: success rates by family, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.agents.rollout import denoise
from diffusion_gym.config import SamplerConfig
from diffusion_gym.models.base import DenoisingModel
from diffusion_gym.rewards import evaluate, make_reward
from diffusion_gym.shapes.captions import FAMILIES, Caption, all_captions

_BATCH = 64


def sample_images(policy: DenoisingPolicy, prompts: Sequence[str], generator: torch.Generator) -> torch.Tensor:
    """One picture a prompt, float `(N, 3, H, W)` in [0, 1]; `generator` is on the policy's device."""
    model = policy.model
    noise = torch.randn(len(prompts), *model.latent_shape, generator=generator, device=policy.device)
    return model.decode(denoise(policy, noise, model.tokenize(prompts), generator))


def success_rate(
    policy: DenoisingPolicy,
    captions: Sequence[Caption],
    samples: int,
    rng: np.random.Generator,
    generator: torch.Generator,
) -> tuple[float, float, float]:
    """Strict success over `samples` of the captions, drawn by `rng`: (rate, low, high) of Wilson's 95 % interval."""
    reward, hits = make_reward("Composition", strict=True), 0.0
    prompts = [str(captions[i]) for i in rng.integers(len(captions), size=samples)]
    for start in range(0, samples, _BATCH):
        part = prompts[start : start + _BATCH]
        hits += float(evaluate(reward, sample_images(policy, part, generator), part).scores.sum())
    interval = stats.binomtest(int(hits), samples).proportion_ci(0.95, method="wilson")
    return hits / samples, float(interval.low), float(interval.high)


def success_rates(
    model: DenoisingModel, config: SamplerConfig, samples: int, seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """`success_rate` of each family."""
    rates, policy = dict[str, tuple[float, float, float]](), DenoisingPolicy(model, config)
    for index, family in enumerate(FAMILIES):
        rng = np.random.default_rng([seed, index])
        generator = torch.Generator(policy.device).manual_seed(seed * 100 + index)
        rates[family] = success_rate(policy, all_captions(family), samples, rng, generator)
    return rates


def rate_table(model: DenoisingModel, settings: Sequence[SamplerConfig], samples: int) -> str:
    """A Markdown table of success rates, a row for each sampler."""
    lines = ["| guidance | T | eta | " + " | ".join(FAMILIES) + " |", "|---" * (3 + len(FAMILIES)) + "|"]
    for config in settings:
        rates = success_rates(model, config, samples).values()
        cells = [f"{rate:.2f} ({low:.2f} to {high:.2f})" for rate, low, high in rates]
        chosen = f"{config.guidance_scale:g} | {config.num_inference_steps} | {config.eta:g}"
        lines.append(f"| {chosen} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_model_card(path: Path, title: str, about: str, facts: dict[str, str], table: str) -> None:
    """Write `README.md` of the shipped weights: what they are, how they were made, and what they reach."""
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    path.write_text(
        f"""# {title}

{about}

| | |
|---|---|
{rows}

## Strict success

Share of samples in which every fact of the caption holds, over random captions of a family; in brackets Wilson's 95 %
interval. Measured by the same command.

{table}
""",
        encoding="utf-8",
    )


def weights_size(folder: Path) -> str:
    """What the weights of a pipeline directory take."""
    megabytes = sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / 1e6
    return f"{megabytes:.1f} MB of safetensors: float16, the text encoders float32"


def parameter_counts(networks: Mapping[str, torch.nn.Module]) -> str:
    """How many weights each network has."""
    counts = {name: sum(weight.numel() for weight in net.parameters()) / 1e6 for name, net in networks.items()}
    return ", ".join(f"{name} {millions:.2f} M" for name, millions in counts.items())
