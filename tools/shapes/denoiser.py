"""Stage 2 of the `Shapes` model: the UNet and the text encoder, trained jointly to predict the noise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from diffusion_gym.shapes.captions import Caption
from tools.shapes.networks import make_scheduler, make_text_encoder, make_unet
from tools.shapes.training import Stage

CAPTION_DROPOUT: Final = 0.1  # share of captions replaced by the empty one, for classifier-free guidance


@dataclass(frozen=True)
class Phase:
    """A part of the training, from step `start` on.

    Where things are is settled at high noise, and the epsilon loss hardly weighs it there (the error of x0 counts in
    proportion to the signal-to-noise ratio). Relations stay at chance for long, so later phases draw half of the
    timesteps from the noisy end, weight them up, and draw captions by `shares` rather than as they come.

    Attributes:
        start: the first step.
        shares: chance of each kind of caption; None for the training set's own.
        largest_weight: the loss is weighted by 1 / SNR, clamped to [1, this].
    """

    start: int
    shares: Mapping[str, float] | None = None
    largest_weight: float = 1.0


NOISY_FROM: Final = 600  # the noisy end: timesteps from here on
PHASES: Final = (
    Phase(0),
    Phase(5_500, {"color": 0.2, "count": 0.2, "composition": 0.1, "location": 0.5}),
    Phase(8_000, {"color": 0.12, "count": 0.2, "composition": 0.03, "location": 0.5, "plain location": 0.15}, 20.0),
    Phase(10_000, {"color": 0.2, "count": 0.3, "composition": 0.05, "location": 0.35, "plain location": 0.1}),
)


def kind(caption: Caption) -> str:
    """The family of a caption, relations between things without colors counting as a kind of their own."""
    plain = caption.family == "location" and caption.things[0].color is None
    return "plain location" if plain else caption.family


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
    kinds: list[str],
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
        kinds: `kind` of each caption.
        stop: the step to stop at; the learning rate is then still on its way down.
        steps: length of the learning-rate schedule.
        batch: samples a step.
        after: called with the step's number whenever the state is saved.
    """
    scheduler = make_scheduler()
    unet, text = stage.modules["unet"], stage.modules["text"]
    device = next(unet.parameters()).device

    total = scheduler.config.num_train_timesteps
    ratio = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    chances = {phase.start: _chances(phase, kinds) for phase in PHASES if phase.shares}

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(len(latents), (batch,), generator=generator)
        phase = max((phase for phase in PHASES if phase.start <= step), key=lambda phase: phase.start)
        if phase.shares:
            chosen = torch.multinomial(chances[phase.start], batch, replacement=True, generator=generator)
        x0 = latents[chosen]
        noise = torch.randn(x0.shape, generator=generator)
        t = torch.randint(total, (batch,), generator=generator)
        if phase.shares:
            t[: batch // 2] = torch.randint(NOISY_FROM, total, (batch // 2,), generator=generator)
        dropped = torch.rand(batch, 1, generator=generator) < CAPTION_DROPOUT
        caption = torch.where(dropped, null, tokens[chosen]).to(device)
        noisy = scheduler.add_noise(x0, noise, t).to(device, memory_format=torch.channels_last)
        predicted = unet(noisy, t.to(device), encoder_hidden_states=text(caption)[0], return_dict=False)[0]
        errors = (predicted - noise.to(device)).square().mean((1, 2, 3))
        return (errors * (1 / ratio[t]).clamp(1, phase.largest_weight).to(device)).mean()

    stage.run(stop, loss, after, schedule=steps)
    stage.use_average()
    return unet.eval(), text.eval()


def _chances(phase: Phase, kinds: list[str]) -> torch.Tensor:
    """The chance of each picture in a phase; kinds that the phase does not tell apart count as their family."""
    shares = phase.shares or {}
    named = [entry if entry in shares else entry.removeprefix("plain ") for entry in kinds]
    counts = Counter(named)
    return torch.tensor([shares[entry] / counts[entry] for entry in named])
