"""Grids of pictures as PNG files."""

from __future__ import annotations

import io
import math
from pathlib import Path

import torch
from PIL import Image

from diffusion_gym.storage import write_bytes

_LEAST_SIDE = 96  # small pictures are enlarged to this many pixels, so that a person can see them


def grid(pictures: torch.Tensor, columns: int | None = None) -> Image.Image:
    """Pictures, uint8 `(N, H, W, 3)`, in rows of `columns` (the squarest grid by default)."""
    number, height, width, _ = pictures.shape
    columns = columns or math.ceil(math.sqrt(number))
    rows = math.ceil(number / columns)
    gap = max(1, height // 32)
    sheet = torch.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=torch.uint8)
    for index, picture in enumerate(pictures.cpu()):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    image = Image.fromarray(sheet.numpy())
    scale = max(1, _LEAST_SIDE // height)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def png_bytes(image: Image.Image) -> bytes:
    """A picture as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def save_grid(path: Path, pictures: torch.Tensor, columns: int | None = None) -> None:
    """Write a grid of uint8 `(N, H, W, 3)` pictures, atomically."""
    data = png_bytes(grid(pictures, columns))
    write_bytes(path, data)
