"""Stage 1 of the `Shapes` model: the autoencoder, its training and the whitening of its latents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from diffusion_gym.images import to_float
from tools.shapes.networks import make_autoencoder
from tools.shapes.training import Stage

KL_WEIGHTS = (1e-4, 2e-5)  # first the wide latents, then sharp pictures: 29 to 34 dB in the prototype


def as_input(pictures: NDArray[np.uint8], device: torch.device) -> torch.Tensor:
    """uint8 (N, 32, 32, 3) -> float (N, 3, 32, 32) in [-1, 1], the autoencoder's range."""
    return to_float(torch.from_numpy(pictures)).to(device) * 2 - 1


def train_autoencoder(
    pictures: NDArray[np.uint8], folder: Path, *, steps: int, batch: int, seed: int, device: torch.device
) -> AutoencoderKL:
    """Train on uint8 `pictures` (N, 32, 32, 3), resuming from `folder`, and whiten the latents."""
    torch.manual_seed(seed)
    model = make_autoencoder().to(device)
    stage = Stage("autoencoder", nn.ModuleDict({"vae": model}), folder, lr=2e-3, ema=0.995, seed=seed)

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(len(pictures), (batch,), generator=generator).numpy()
        images = as_input(pictures[chosen], device)
        posterior = model.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        decoded = model.decode(posterior.mean + posterior.std * noise).sample
        weight = KL_WEIGHTS[0] if step < steps // 2 else KL_WEIGHTS[1]
        return F.mse_loss(decoded, images) + weight * posterior.kl().mean() / posterior.mean[0].numel()

    stage.run(steps, loss)
    stage.use_average()
    model.eval()
    whiten(model, pictures[:2048], device)
    return model


@torch.no_grad()
def encode(model: AutoencoderKL, pictures: NDArray[np.uint8], device: torch.device) -> torch.Tensor:
    """Posterior means of uint8 (N, 32, 32, 3) pictures: float32 (N, 4, 8, 8) on the CPU."""
    parts = [
        model.encode(as_input(pictures[i : i + 256], device)).latent_dist.mean.cpu()
        for i in range(0, len(pictures), 256)
    ]
    return torch.cat(parts)


@torch.no_grad()
def whiten(model: AutoencoderKL, pictures: NDArray[np.uint8], device: torch.device) -> None:
    """Fold a per-channel shift and scale into the two 1x1 convolutions at the latents.

    Afterwards each latent channel has mean 0 and variance 1 over `pictures`, and the decoder undoes it, so
    that `scaling_factor` can be 1.
    """
    latents = encode(model, pictures, device).to(device)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    quant, post = model.quant_conv, model.post_quant_conv
    channels = len(mean)
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()  # the second half is the log-variance
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(1)
    post.weight *= std[None, :, None, None]


@torch.no_grad()
def reconstruct(model: AutoencoderKL, pictures: NDArray[np.uint8], device: torch.device) -> torch.Tensor:
    """Pictures (N, 32, 32, 3) after encoding and decoding: float (N, 3, 32, 32) in [0, 1] on the CPU."""
    decoded = model.decode(encode(model, pictures, device).to(device)).sample
    return (decoded / 2 + 0.5).clamp(0, 1).cpu()
