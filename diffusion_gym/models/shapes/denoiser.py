"""Stage 2 of the `Shapes` model: the UNet and the text encoder, trained jointly to predict the noise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from diffusion_gym.models.shapes.networks import make_scheduler, make_text_encoder, make_unet
from diffusion_gym.models.shapes.training import Stage

CAPTION_DROPOUT: Final = 0.1  # share of captions replaced by the empty one, for classifier-free guidance

# Where things are is settled at high noise, and relations are what the first steps do not learn (a success rate at
# chance). So from LAYOUT_FROM on, half of the timesteps come from the noisy end, and captions are drawn anew by family.
LAYOUT_FROM: Final = 5_500
LAYOUT_TIMESTEPS: Final = 600
LAYOUT_SHARES: Final = {"color": 0.2, "count": 0.2, "composition": 0.1, "location": 0.5}


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Token ids, int64 (N, L), padded to the model's length."""
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def make_stage(tokenizer: CLIPTokenizer, folder: Path, *, seed: int, device: torch.device) -> Stage:
    """The stage with freshly made networks `unet` and `text`, or those of the last saved state in `folder`."""
    torch.manual_seed(seed)
    text = make_text_encoder(len(tokenizer), tokenizer.eos_token_id, tokenizer.bos_token_id)
    networks = nn.ModuleDict({"unet": make_unet(), "text": text}).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Stage("denoiser", networks, folder, lr=1e-3, ema=0.999, seed=seed)


def train_denoiser(
    stage: Stage,
    latents: torch.Tensor,
    tokens: torch.Tensor,
    null: torch.Tensor,
    families: list[str],
    *,
    stop: int,
    steps: int,
    batch: int,
    after: Callable[[int], None] | None = None,
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Train with the epsilon loss, E ||eps - eps_theta(x_t, t, c)||^2, and return the averaged networks.

    Args:
        stage: made by `make_stage`.
        latents: whitened latents (N, 4, 8, 8).
        tokens: caption tokens (N, L).
        null: tokens of the empty caption (1, L).
        families: family of each caption.
        stop: the step to stop at; the learning rate is then still on its way down.
        steps: length of the learning-rate schedule.
        batch: samples a step.
        after: called with the step's number whenever the state is saved.
    """
    scheduler = make_scheduler()
    unet, text = stage.modules["unet"], stage.modules["text"]
    device = next(unet.parameters()).device

    total = scheduler.config.num_train_timesteps
    counts = Counter(families)
    weights = torch.tensor([LAYOUT_SHARES[family] / counts[family] for family in families])

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(len(latents), (batch,), generator=generator)
        if step >= LAYOUT_FROM:
            chosen = torch.multinomial(weights, batch, replacement=True, generator=generator)
        x0 = latents[chosen]
        noise = torch.randn(x0.shape, generator=generator)
        t = torch.randint(total, (batch,), generator=generator)
        if step >= LAYOUT_FROM:
            t[: batch // 2] = torch.randint(LAYOUT_TIMESTEPS, total, (batch // 2,), generator=generator)
        dropped = torch.rand(batch, 1, generator=generator) < CAPTION_DROPOUT
        caption = torch.where(dropped, null, tokens[chosen]).to(device)
        noisy = scheduler.add_noise(x0, noise, t).to(device, memory_format=torch.channels_last)
        predicted = unet(noisy, t.to(device), encoder_hidden_states=text(caption)[0], return_dict=False)[0]
        return F.mse_loss(predicted, noise.to(device))

    stage.run(stop, loss, after, schedule=steps)
    stage.use_average()
    return unet.eval(), text.eval()
