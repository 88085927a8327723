"""Plain sampling from a model, without an environment: for measuring and testing models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from diffusion_gym.config import SamplerConfig
from diffusion_gym.models.base import DenoisingModel, null_embedding
from diffusion_gym.scheduling import guide, step_gaussian


@torch.no_grad()
def sample_images(
    model: DenoisingModel, prompts: Sequence[str], config: SamplerConfig, generator: torch.Generator
) -> torch.Tensor:
    """One picture a prompt, float `(N, 3, H, W)` in [0, 1]; `generator` is a CPU one."""
    table = model.step_table(config).to(model.device)
    number = len(prompts)
    embeddings = model.embed(model.tokenize(prompts))
    both = torch.cat([embeddings, null_embedding(model).expand_as(embeddings)])
    x = torch.randn(number, *model.latent_shape, generator=generator).to(model.device)
    for step in range(len(table)):
        steps = torch.full((number,), step, device=model.device)
        times = table.network_timesteps[steps]
        if getattr(model, "embeds_guidance", False):
            told: dict[str, Any] = {"guidance_scale": config.guidance_scale}
            output = model.predict(model.unet, x, times, embeddings, **told).float()
        else:
            twice = model.predict(model.unet, torch.cat([x, x]), times.repeat(2), both).float()
            conditional, unconditional = twice.chunk(2)
            output = guide(conditional, unconditional, config.guidance_scale)
        mean, std = step_gaussian(table, steps, x, output)
        x = mean + std * torch.randn(x.shape, generator=generator).to(model.device)
    return model.decode(x)
