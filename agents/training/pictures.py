"""Grids of pictures as PNG files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from diffusion_gym.images import as_png
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
    gap, scale = _spacing(height)
    sheet = torch.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=torch.uint8)
    for index, picture in enumerate(pictures.cpu()):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    image = Image.fromarray(sheet.numpy())
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def cells(sheet: Image.Image, size: Sequence[int], number: int) -> list[Image.Image]:
    """The pictures of a grid, as large as they were.

    Args:
        sheet: what `grid` has made.
        size: height and width of the pictures.
        number: of the pictures.

    Raises:
        ValueError: the sheet is no grid of so many pictures of this size.
    """
    (height, width), (gap, scale) = size, _spacing(size[0])
    columns = (sheet.width // scale + gap) // (width + gap)
    rows = math.ceil(number / max(1, columns))
    if sheet.size != (scale * (columns * (width + gap) - gap), scale * (rows * (height + gap) - gap)):
        raise ValueError(f"a picture of {sheet.size} pixels is no grid of {number} of {width}x{height}; run eval again")
    small = sheet.resize((sheet.width // scale, sheet.height // scale), Image.Resampling.NEAREST)
    corners = [(index % columns * (width + gap), index // columns * (height + gap)) for index in range(number)]
    return [small.crop((left, top, left + width, top + height)) for left, top in corners]


def _spacing(height: int) -> tuple[int, int]:
    """Pixels between pictures of a grid, and by how much all of it is enlarged."""
    return max(1, height // 32), max(1, _LEAST_SIDE // height)


def png_bytes(image: Image.Image) -> bytes:
    """A picture as PNG."""
    return as_png(image, optimize=True)


def save_grid(path: Path, pictures: torch.Tensor, columns: int | None = None) -> None:
    """Write a grid of uint8 `(N, H, W, 3)` pictures, atomically."""
    data = png_bytes(grid(pictures, columns))
    write_bytes(path, data)


def drop_pictures_after(folder: Path, name: str, iteration: int) -> None:
    """Remove `NAME-NUMBER.png` of iterations after this one, from which a run goes on."""
    for path in folder.glob(f"{name}-*.png"):
        number = path.stem.removeprefix(f"{name}-")
        if number.isdecimal() and int(number) > iteration:
            path.unlink()


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
    places, size = _places(width, height, len(pairs))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN // 2), _fitting(_SHEET_TITLE, size[0] - 2 * _MARGIN, draw, font), "black", font)
    for index, (pair, prompt, (left, top)) in enumerate(zip(pairs, prompts, places, strict=True)):
        sheet.paste(pair[0], (left, top))
        sheet.paste(pair[1], (left + width + _GAP, top))
        before, after = original_rewards[index], current_rewards[index]
        color = "#0b6b3a" if after > before else "#b02020" if after < before else "#444444"
        numbers = f"{before:.4g} -> {after:.4g} ({after - before:+.3g})"
        draw.text((left, top + height + 2), _fitting(prompt, 2 * width + _GAP, draw, font), "#444444", font)
        draw.text((left, top + height + _LINE + 2), numbers, color, font)
    return sheet


def sheet_pairs(sheet: Image.Image, picture: torch.Tensor, number: int) -> list[tuple[Image.Image, Image.Image]]:
    """The pairs of pictures of a sheet, as they are on it.

    Args:
        sheet: what `compared_sheet` has made.
        picture: uint8 `(H, W, 3)`, of the size of those that it was made of.
        number: of the pairs.

    Raises:
        ValueError: the sheet is none of so many pairs of this size.
    """
    width, height = _thumbnail(picture).size
    places, size = _places(width, height, number)
    if sheet.size != size:
        raise ValueError(f"a picture of {sheet.size} pixels is no sheet of {number} pairs, which has {size}")
    boxes = [(left, top, left + width, top + height) for left, top in places]
    right = width + _GAP
    return [(sheet.crop(box), sheet.crop((box[0] + right, box[1], box[2] + right, box[3]))) for box in boxes]


def _places(width: int, height: int, number: int) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Left and top of each pair of a sheet, and the size of the sheet."""
    across, down = 2 * width + _GAP + _MARGIN, height + 2 * _LINE + 2 + _MARGIN
    columns = min(_PAIRS, number)
    places = [
        (_MARGIN + index % columns * across, _MARGIN + _LINE + index // columns * down) for index in range(number)
    ]
    return places, (_MARGIN + columns * across, _MARGIN + _LINE + math.ceil(number / columns) * down)


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
