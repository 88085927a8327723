"""Grids of pictures as PNG files."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from diffusion_gym.storage import write_bytes

_LEAST_SIDE = 96  # small pictures are enlarged to this many pixels, so that a person can see them
_MOST_SIDE = 128  # of a picture on a sheet of pairs
_PAIRS = 4  # in a row of such a sheet
_GAP, _MARGIN, _LINE = 2, 14, 14  # pixels within a pair, around one, and of a line of text
_SHEET_TITLE = "left: pretrained model, right: now; reward before -> after (difference)"

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


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


def compared_sheet(
    original: torch.Tensor,
    current: torch.Tensor,
    original_rewards: Sequence[float],
    current_rewards: Sequence[float],
    prompts: Sequence[str],
) -> Image.Image:
    """Pairs of pictures with their prompt, both rewards and the difference below.

    Args:
        original: uint8 `(N, H, W, 3)`, left in each pair.
        current: the same, right.
        original_rewards: of the N originals.
        current_rewards: of the N others.
        prompts: the N prompts; cut off where they do not fit.
    """
    font = ImageFont.load_default()
    pairs = [[_thumbnail(entry) for entry in pair] for pair in zip(original.cpu(), current.cpu(), strict=True)]
    width, height = pairs[0][0].size
    across, down = 2 * width + _GAP, height + 2 * _LINE + 2
    columns = min(_PAIRS, len(pairs))
    rows = math.ceil(len(pairs) / columns)
    size = (_MARGIN + columns * (across + _MARGIN), _MARGIN + _LINE + rows * (down + _MARGIN))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN // 2), _fitting(_SHEET_TITLE, size[0] - 2 * _MARGIN, draw, font), "black", font)
    for index, (pair, prompt) in enumerate(zip(pairs, prompts, strict=True)):
        row, column = divmod(index, columns)
        left, top = _MARGIN + column * (across + _MARGIN), _MARGIN + _LINE + row * (down + _MARGIN)
        sheet.paste(pair[0], (left, top))
        sheet.paste(pair[1], (left + width + _GAP, top))
        before, after = original_rewards[index], current_rewards[index]
        color = "#0b6b3a" if after > before else "#b02020" if after < before else "#444444"
        numbers = f"{before:.4g} -> {after:.4g} ({after - before:+.3g})"
        draw.text((left, top + height + 2), _fitting(prompt, across, draw, font), "#444444", font)
        draw.text((left, top + height + _LINE + 2), numbers, color, font)
    return sheet


def _thumbnail(picture: torch.Tensor) -> Image.Image:
    """A picture uint8 `(H, W, 3)`, enlarged or made smaller for a sheet."""
    image = Image.fromarray(picture.numpy())
    if (scale := _LEAST_SIDE // image.height) > 1:
        return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    image.thumbnail((_MOST_SIDE, _MOST_SIDE), Image.Resampling.LANCZOS)
    return image


def _fitting(text: str, width: int, draw: ImageDraw.ImageDraw, font: Font) -> str:
    """As much of a text as fits, in characters that Pillow's own font has."""
    text = " ".join(text.split()).encode("latin-1", "replace").decode("latin-1")
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "...", font) > width:
        text = text[:-1]
    return text + "..."
