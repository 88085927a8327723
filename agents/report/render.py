"""From templates to one self-contained page: pictures as data URIs, charts inline, all text escaped."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from diffusion_gym.agents.report.numbers import change, number, percent
from diffusion_gym.agents.training.pictures import png_bytes

_LONG: Final = 24  # letters; a shorter name fits wherever one stands
_ENLARGED: Final = 480  # pixels; wider grids hold pictures that `pictures.grid` did not have to enlarge
_OF_A_PAIR: Final = 200  # pixels at most
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
        kind = "png"
        if image.width > widest:
            kind, buffer = "jpeg", io.BytesIO()
            image = image.resize((widest, round(image.height * widest / image.width)), Image.Resampling.LANCZOS)
            image.convert("RGB").save(buffer, "JPEG", quality=88)
            data = buffer.getvalue()
        elif isinstance(data, Image.Image):
            data = png_bytes(data)
        return cls(f"data:image/{kind};base64,{base64.b64encode(data).decode()}", alt, *image.size)


def pair(
    prompt: str, images: Sequence[Image.Image], rewards: Sequence[float], passed: Sequence[float | None] = (None, None)
) -> dict[str, Any]:
    """The pictures of the pretrained and the tuned model from the same noise, and what is under them.

    Args:
        prompt: of both.
        images: the two; made smaller where they are large.
        rewards: of both.
        passed: 1 for a strict success, 0 for none; None where the reward is not strict.
    """
    shown = [
        Picture.of(each, f"{name}: {prompt}", _OF_A_PAIR)
        for name, each in zip(("Before", "After"), images, strict=True)
    ]
    return {"prompt": prompt, "pictures": list(zip(shown, rewards, passed, strict=True))}


def breakable(name: str) -> str | Markup:
    """A long name that may be broken between its parts, so that it is not broken within one."""
    if len(name) <= _LONG:
        return name
    return Markup("<wbr>").join(re.split(r"(?<=[_:./])", name))


def to_image(picture: torch.Tensor) -> Image.Image:
    """A picture, uint8 `(H, W, 3)`, as one of Pillow."""
    return Image.fromarray(picture.numpy())


def spread(length: int, most: int) -> list[int]:
    """Up to `most` places from the first to the last of `length`, evenly spread."""
    return sorted({round(index * (length - 1) / (most - 1)) for index in range(most)}) if length else []


def render(template: str, **content: Any) -> str:
    """The text that a template makes of what it is given, all of it escaped."""
    return _environment().get_template(template).render(content)


@cache
def _environment() -> Environment:
    """The templates of this folder; a name that they are not given is an error."""
    options: dict[str, Any] = {"autoescape": True, "undefined": StrictUndefined}
    loader = PackageLoader("diffusion_gym.agents.report")
    environment = Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, **options)
    helpers: dict[str, Callable[..., Any]] = {"number": number, "percent": percent, "change": change}
    environment.filters.update({**helpers, "breakable": breakable})
    environment.globals.update(helpers)
    return environment
