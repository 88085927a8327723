"""The only place that converts between pictures for networks and pictures for people."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from PIL import Image


def to_unit(values: torch.Tensor) -> torch.Tensor:
    """Float pictures in [-1, 1], as networks give them -> float32 in [0, 1], clamped.

    What is not finite becomes NaN: clamped, an overflow would look like a white or black pixel.
    """
    halves = values.float() / 2 + 0.5
    return torch.where(halves.isfinite(), halves.clamp(0, 1), torch.nan)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Float `(N, 3, H, W)` in [0, 1] -> uint8 `(N, H, W, 3)` on the same device, rounded and clamped; NaN is black."""
    levels = (images.detach().float().nan_to_num(0.0).clamp(0, 1) * 255).round()
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def to_float(pictures: torch.Tensor) -> torch.Tensor:
    """Uint8 `(N, H, W, 3)` -> float32 `(N, 3, H, W)` in [0, 1] on the same device."""
    # In one step and in place: for a large batch, copies in between would take two times its memory more.
    return pictures.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format, copy=True).div_(255)


def as_png(picture: Image.Image, **options: Any) -> bytes:
    """A picture as the bytes of a PNG file; `options` are those of Pillow's `save`."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", **options)
    return buffer.getvalue()
