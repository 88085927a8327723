"""Draws the pictures that the `Shapes` model is trained on: true scenes for a caption.

A picture is 32x32 RGB, drawn four times larger and reduced, so that edges are smooth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from diffusion_gym.shapes.captions import COLORS, Caption, holds

SIZE: Final = 32
RGB: Final = dict(
    zip(
        COLORS,
        [(214, 39, 40), (44, 160, 44), (31, 80, 220), (240, 215, 30), (140, 50, 190), (30, 205, 215)],
        strict=True,
    )
)
_SCALE: Final = 4
_MARGIN: Final = 1.0  # pixels between two objects, and between an object and the border
_RADII: Final = {1: (5.0, 8.5), 2: (4.5, 6.5), 3: (4.2, 5.4), 4: (4.0, 4.8)}  # by number of objects


@dataclass(frozen=True)
class SceneObject:
    """One drawn object; `x`, `y` and `radius` in pixels of the 32x32 picture, y downwards."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


def outline(shape: str, radius: float) -> list[tuple[float, float]]:
    """Corners of a polygonal shape around the origin, `radius` being that of the enclosing circle."""
    if shape == "square":
        half = radius * 0.82
        return [(-half, -half), (half, -half), (half, half), (-half, half)]
    corners = {"triangle": 3, "star": 10}[shape]
    inner = {"triangle": 1.0, "star": 0.42}[shape]
    turn = 2 * math.pi / corners
    radii = [radius * (inner if k % 2 else 1.0) for k in range(corners)]
    points = [(r * math.sin(k * turn), -r * math.cos(k * turn)) for k, r in enumerate(radii)]
    drop = radius * 0.2 if shape == "triangle" else 0.0  # a triangle's box is not centred on its centroid
    return [(x, y + drop) for x, y in points]


def draw(objects: Sequence[SceneObject], background: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Paint `objects` on a background of grey levels (32, 32); returns uint8 (32, 32, 3)."""
    side = SIZE * _SCALE
    grey = Image.fromarray(background.round().astype(np.uint8)).resize((side, side), Image.Resampling.BILINEAR)
    canvas = grey.convert("RGB")
    pen = ImageDraw.Draw(canvas)
    for item in objects:
        x, y, r = item.x * _SCALE, item.y * _SCALE, item.radius * _SCALE
        if item.shape == "circle":
            pen.ellipse((x - 0.92 * r, y - 0.92 * r, x + 0.92 * r, y + 0.92 * r), fill=RGB[item.color])
        else:
            pen.polygon([(x + dx, y + dy) for dx, dy in outline(item.shape, r)], fill=RGB[item.color])
    return np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX))


def random_background(rng: np.random.Generator) -> NDArray[np.float64]:
    """A grey background (32, 32): flat, or a linear gradient in a random direction."""
    level = rng.uniform(90, 200)
    if rng.random() < 0.5:
        return np.full((SIZE, SIZE), level)
    angle, slope = rng.uniform(0, 2 * math.pi), rng.uniform(10, 40)
    axis = np.linspace(-1, 1, SIZE)
    ramp = math.cos(angle) * axis[None, :] + math.sin(angle) * axis[:, None]
    return np.clip(level + slope * ramp, 60, 230)


def place(caption: Caption, rng: np.random.Generator) -> list[SceneObject]:
    """Objects without overlap that make `caption` true; free colors are drawn at random."""
    things = [thing for thing in caption.things for _ in range(thing.number)]
    low, high = _RADII[len(things)]
    colors = [thing.color or str(rng.choice(COLORS)) for thing in things]
    while True:
        radii = rng.uniform(low, high, len(things))
        room = radii[:, None] + _MARGIN
        centres = rng.uniform(room, SIZE - room, (len(things), 2))
        if _apart(centres, radii) and _related(caption, centres):
            break
    return [
        SceneObject(thing.shape, color, float(x), float(y), float(r))
        for thing, color, (x, y), r in zip(things, colors, centres, radii, strict=True)
    ]


def _apart(centres: NDArray[np.float64], radii: NDArray[np.float64]) -> bool:
    distance = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
    least = radii[:, None] + radii[None] + _MARGIN
    return bool((distance >= least)[~np.eye(len(radii), dtype=bool)].all())


def _related(caption: Caption, centres: NDArray[np.float64]) -> bool:
    if caption.relation is None:
        return True
    dx, dy = centres[0] - centres[1]
    clear = max(abs(dx), abs(dy)) > 1.7 * min(abs(dx), abs(dy))  # no scene near the diagonal
    return bool(clear and holds(caption.relation, dx, dy))


def render(caption: Caption, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A random true picture of `caption`, uint8 (32, 32, 3)."""
    return draw(place(caption, rng), random_background(rng))
