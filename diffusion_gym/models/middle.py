"""What the middle of a denoising network makes of a state: features of the picture in it (arXiv:2112.03126)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffusion_gym.models.base import DenoisingModel


def middle_block(network: nn.Module) -> nn.Module | None:
    """The middle block of a UNet, or the middle one of a transformer's blocks; None where there is neither.

    Of a transformer it is that of the first kind of block: the one whose picture has a stream of its own, in those with
    blocks of two kinds.
    """
    middle = getattr(network, "mid_block", None)
    blocks = getattr(network, "transformer_blocks", None) or getattr(network, "layers", None)
    return middle if middle is not None or not blocks else blocks[len(blocks) // 2]


def middle_features(
    model: DenoisingModel, latents: torch.Tensor, timesteps: torch.Tensor, embeddings: torch.Tensor | None, parts: int
) -> torch.Tensor:
    """Means over each part of the picture of the middle block's output: float32 `(N, parts^2 D)`.

    They are means over all tokens, `(N, D)`, where those of picture and text are one sequence.

    Args:
        model: whose pretrained network has a `middle_block`.
        latents: x_t, float32 `(N, C, H, W)`.
        timesteps: the scheduler's t, `(N,)`.
        embeddings: of the prompts, `(N, L, D)`.
        parts: of the picture along each side.
    """
    kept: list[torch.Tensor] = []

    def keep(module: nn.Module, given: Any, output: Any) -> None:
        picture: torch.Tensor = output[-1] if isinstance(output, tuple) else output  # the text's stream comes before it
        kept.append(_pooled(picture.float(), latents.shape[2:], parts))

    middle = middle_block(model.unet)
    assert middle is not None
    handle = middle.register_forward_hook(keep)
    try:
        model.predict(model.unet, latents, timesteps, embeddings)
    finally:
        handle.remove()
    return kept[0]


def _pooled(output: torch.Tensor, size: torch.Size, parts: int) -> torch.Tensor:
    """Means of `(N, D, h, w)`, or of tokens `(N, L, D)` that are patches of latents of a size, in rows."""
    if output.ndim == 3:
        patch = round((size.numel() / output.shape[1]) ** 0.5)
        if patch < 1 or any(side % patch for side in size) or size.numel() != patch**2 * output.shape[1]:
            return output.mean(1)
        output = output.transpose(1, 2).unflatten(2, (size[0] // patch, size[1] // patch))
    return nn.functional.adaptive_avg_pool2d(output, parts).flatten(1)
