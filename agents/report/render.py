"""From templates to one self-contained page: pictures as data URIs, charts inline, all text escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image

from diffusion_gym.agents.pictures import png_bytes
from diffusion_gym.agents.report.numbers import change, number, percent
from diffusion_gym.storage import write_text

_ENLARGED: Final = 480  # pixels; wider grids hold pictures that `pictures.grid` did not have to enlarge
_WIDEST: Final = 1200  # pixels; wider grids are made smaller, or the page would have tens of megabytes


@dataclass(frozen=True)
class Picture:
    """A picture within a page.

    Attributes:
        src: its bytes as a data URI.
        alt: what it shows, in words.
        width: in pixels.
        height: in pixels.
    """

    src: str
    alt: str
    width: int
    height: int

    @property
    def kind(self) -> str:
        """The class of the page's style: small pictures are enlarged pixel by pixel."""
        return "pixelated" if self.width <= _ENLARGED else "smooth"

    @classmethod
    def of(cls, data: bytes | Image.Image, alt: str, widest: int = _WIDEST) -> Picture:
        """A picture, or the PNG of one; if it is wider than `widest` pixels, it is made smaller, a JPEG."""
        image = data if isinstance(data, Image.Image) else Image.open(io.BytesIO(data))
        width, height = image.size
        if width > widest:
            width, height = widest, round(height * widest / width)
            buffer, kind = io.BytesIO(), "jpeg"
            image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=88)
            data = buffer.getvalue()
        else:
            kind, data = "png", png_bytes(data) if isinstance(data, Image.Image) else data
        return cls(f"data:image/{kind};base64,{base64.b64encode(data).decode()}", alt, width, height)


@dataclass(frozen=True)
class Pair:
    """The pictures of two models from the same noise.

    Attributes:
        prompt: of both.
        pictures: the pretrained model's and the tuned one's.
        rewards: of both.
        passed: whether either is a strict success; None where the reward is not strict.
    """

    prompt: str
    pictures: tuple[Picture, Picture]
    rewards: tuple[float, float]
    passed: tuple[bool | None, bool | None] = (None, None)


def pair(
    prompt: str,
    images: Sequence[Image.Image],
    rewards: Sequence[float],
    passed: Sequence[float | None] = (None, None),
    widest: int = 200,
) -> Pair:
    """The pictures of the pretrained and the tuned model, each at most `widest` pixels wide, and what is under them."""
    names = ("Before", "After")
    shown = [Picture.of(image, f"{name}: {prompt}", widest) for name, image in zip(names, images, strict=True)]
    marks = [None if mark is None else mark == 1 for mark in passed]
    return Pair(prompt, (shown[0], shown[1]), (rewards[0], rewards[1]), (marks[0], marks[1]))


def to_image(picture: torch.Tensor) -> Image.Image:
    """A picture, uint8 `(H, W, 3)`, as one of Pillow."""
    return Image.fromarray(picture.numpy())


@cache
def environment() -> Any:
    """The templates of this folder; what they are given is escaped, and a name that they are not given is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    found = Environment(
        loader=PackageLoader("diffusion_gym.agents.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    helpers: dict[str, Callable[..., Any]] = {"number": number, "percent": percent, "change": change}
    found.filters.update(helpers)
    found.globals.update(helpers)
    return found


def render(template: str, **content: Any) -> str:
    """The text that a template makes of what it is given."""
    text: str = environment().get_template(template).render(content)
    return text


def write_page(path: Path, template: str, **content: Any) -> Path:
    """Write a page, atomically."""
    write_text(path, render(template, **content))
    return path
