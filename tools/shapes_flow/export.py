"""Writes the pipeline directory of `ShapesFlow`, and measures what it reaches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.utils import logging

from diffusion_gym.config import SamplerConfig
from diffusion_gym.models.sd3 import SD3Model
from tools.shapes.measure import success_rates
from tools.shapes.vocabulary import write_tokenizer
from tools.shapes_flow.networks import load_autoencoder, make_scheduler, make_silent_t5, make_trained

# What leaves a learner both signal and room, at T = 10.
RANGES: Mapping[str, tuple[float, float]] = {
    "color": (0.95, 1.0),
    "count": (0.5, 0.8),
    "composition": (0.6, 0.9),
    "location": (0.3, 0.6),
}


def export(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Write a `StableDiffusion3Pipeline` directory of averaged `weights`.

    The transformer and the autoencoder are in float16: diffusers loads its own networks as float32 all the same. The
    text encoders are in float32, as transformers keeps the dtype of the file.
    """
    tokenizer, tokenizer_2 = (write_tokenizer(folder / name) for name in ("tokenizer", "tokenizer_2"))
    encoder_3, tokenizer_3 = make_silent_t5(folder / "tokenizer_3")
    networks = make_trained(tokenizer)
    missing, unexpected = networks.load_state_dict(weights, strict=False)
    buffers = {name for name, _ in networks.named_buffers()}
    if unexpected or set(missing) - buffers:
        raise ValueError(f"weights={folder} are of other networks; train anew in another work folder")
    logging.disable_progress_bar()
    StableDiffusion3Pipeline(
        transformer=networks["transformer"].half(),
        scheduler=make_scheduler(),
        vae=load_autoencoder().half(),
        text_encoder=networks["text_encoder"],
        tokenizer=tokenizer,
        text_encoder_2=networks["text_encoder_2"],
        tokenizer_2=tokenizer_2,
        text_encoder_3=encoder_3,
        tokenizer_3=tokenizer_3,
    ).save_pretrained(folder)
    for name in ("tokenizer", "tokenizer_2"):
        write_tokenizer(folder / name)  # transformers 5 leaves out vocab.json and merges.txt


def load(folder: Path, device: torch.device) -> SD3Model:
    """The exported model, for measuring."""
    return SD3Model(folder, device=device, dtype=torch.float32, name="ShapesFlow")


def rates(model: SD3Model, samples: int, guidance: float, steps: int = 10) -> dict[str, float]:
    """Strict success by family with Euler's method."""
    config = SamplerConfig(num_inference_steps=steps, guidance_scale=guidance, eta=0.0)
    return {family: rate for family, (rate, _, _) in success_rates(model, config, samples).items()}


def distance(found: Mapping[str, float]) -> float:
    """How far rates are out of `RANGES`, summed; within all of them minus the least distance to a border."""
    gaps = [
        max(low - found[family], found[family] - high if high < 1 else -1.0) for family, (low, high) in RANGES.items()
    ]
    outside = sum(gap for gap in gaps if gap > 0)
    return outside if outside > 0 else max(gaps)


def is_too_good(found: Mapping[str, float]) -> bool:
    """Whether rates leave no room in any family, so that more training only spoils the model."""
    return all(found[family] > high for family, (_, high) in RANGES.items() if high < 1)
