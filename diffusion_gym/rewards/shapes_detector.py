"""Finds the objects of a `Shapes` picture: shape, color, place and size, with nothing learned.

A pixel that is a share `a` of an object and `1 - a` of grey has `a` times the object's chroma (the color minus the
mean of its channels), whatever the grey. So the direction of the chroma gives the color and its length the coverage,
also at soft edges. A blob is compared with every shape as `scenes.draw` draws it, both scaled to the same area.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from diffusion_gym.shapes.captions import COLORS, SHAPES
from diffusion_gym.shapes.scenes import RGB, SIZE, SceneObject, draw

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Masks = NDArray[np.bool_]

_EDGE: Final = 0.5  # coverage from which a pixel belongs to an object
_MIN_RADIUS: Final = 3.0  # true objects have 4 and more; a much smaller blob looks like a circle, whatever it is
# Blurred true shapes fit at 0.87 and more, half circles, bars, crescents and flat ellipses below 0.77. A square on its
# corner would pass for a circle, at 0.86; no caption speaks of one.
_MIN_FIT: Final = 0.8
_DEPTHS: Final = (1.1, 1.5, 2.1, 2.5, 3.1, 3.5)  # pixels from the edge, where touching objects may come apart
_POINTS: Final = 28  # side of the normalised view of a blob
_REACH: Final = 1.1  # half the width of that view, in units of the square root of the blob's area
_TEMPLATE_RADII: Final = (4.0, 5.0, 6.5, 8.0)  # edges are softer, relative to the size, on small objects
_TEMPLATE_BLURS: Final = (0.0, 0.7)  # pixels; decoded pictures are a little less sharp than drawn ones


@dataclass(frozen=True)
class Detected:
    """One object; `shape` is None for a blob that looks like none of `SHAPES`.

    `x` and `y` (the centroid, y downwards) and `radius` (that of a `SceneObject` with the same area; of a disc where
    `shape` is None) are in pixels of the 32x32 picture.
    """

    shape: str | None
    color: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class _Blobs:
    """M connected regions: index of the picture `(M,)` and of the color `(M,)`, and the pixels `(M, 32, 32)`."""

    picture: Ints
    color: Ints
    mask: Masks


@dataclass(frozen=True)
class _Views:
    """M blobs moved to the origin and scaled to area 1: `pixels` (M, 784), with the `area`, `x`, `y` (M,) they had."""

    pixels: Floats
    area: Floats
    x: Floats
    y: Floats


def detect(pictures: NDArray[np.uint8]) -> list[list[Detected]]:
    """Find all objects of a batch of pictures.

    Args:
        pictures: uint8 `(N, S, S, 3)`, S a multiple of 32; larger pictures are reduced to 32x32.

    Returns:
        The objects of each picture: malformed ones (shape None) included, specks left out.

    Raises:
        ValueError: an array of another shape or type.
    """
    coverage, nearest = _segment(_reduced(pictures))
    found: list[list[Detected]] = [[] for _ in pictures]
    blobs = _connected(coverage, nearest)
    if len(blobs.picture) == 0:
        return found
    views = _views(_weights(blobs, coverage))
    shapes, radii = _match(views)
    if (shapes < 0).any():
        blobs = _split_touching(blobs, shapes < 0, coverage)
        views = _views(_weights(blobs, coverage))
        shapes, radii = _match(views)
    for i, picture in enumerate(blobs.picture):
        shape = SHAPES[shapes[i]] if shapes[i] >= 0 else None
        place = float(views.x[i]), float(views.y[i])
        found[picture].append(Detected(shape, COLORS[blobs.color[i]], *place, float(radii[i])))
    return found


def _reduced(pictures: NDArray[np.uint8]) -> Floats:
    """The pictures as float32 (N, 32, 32, 3) in [0, 255]."""
    shape = pictures.shape
    if pictures.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2] or shape[1] % SIZE:
        raise ValueError(
            f"pictures={pictures.dtype} {shape} cannot be read; pass uint8 (N, S, S, 3) with S a multiple of {SIZE}"
        )
    factor = shape[1] // SIZE
    cells = pictures.reshape(len(pictures), SIZE, factor, SIZE, factor, 3).astype(np.float32)
    reduced: Floats = cells.mean((2, 4))
    return reduced


def _segment(pictures: Floats) -> tuple[Floats, Ints]:
    """Coverage (N, 6, 32, 32) by each color: 1 on an object, 0 on grey; and the nearest color (N, 32, 32).

    Nearest by the angle between the chromas, which, unlike their distance, is the same at a half covered edge; and
    over 3x3 pixels, so that an object between two colors of the palette does not fall into crumbs of both.
    """
    from scipy import ndimage

    palette = np.array([RGB[color] for color in COLORS], np.float32)
    palette -= palette.mean(1, keepdims=True)
    length = np.linalg.norm(palette, axis=1)
    chroma = pictures - pictures.mean(3, keepdims=True)
    projection = chroma @ (palette.T / length)
    nearest = ndimage.uniform_filter(chroma, (1, 3, 3, 1)) @ (palette.T / length)
    return np.moveaxis(projection / length, 3, 1), nearest.argmax(3)


def _connected(coverage: Floats, nearest: Ints) -> _Blobs:
    """The connected regions of one color, and those left over whose many colors form no such region."""
    colored = (coverage >= _EDGE) & (nearest[:, None] == np.arange(len(COLORS))[:, None, None])
    masks, layer = _regions(colored.reshape(-1, SIZE, SIZE))
    picture, color = layer // len(COLORS), layer % len(COLORS)
    left = colored.any(1)
    np.logical_and.at(left, picture, ~masks)
    more, where = _regions(left)
    mixed = (colored[where] & more[:, None]).sum((2, 3)).argmax(1)
    return _Blobs(np.append(picture, where), np.append(color, mixed), np.concatenate([masks, more]))


def _regions(layers: Masks) -> tuple[Masks, Ints]:
    """The connected regions (M, 32, 32) of K layers (K, 32, 32), and the layer (M,) of each.

    Regions in which not even a plus of five pixels has room are left out: specks, and the seam between two touching
    objects, whose mixed color can be nearest to a third.
    """
    from scipy import ndimage

    plus = np.zeros((3, 3, 3), np.bool_)
    plus[1] = ndimage.generate_binary_structure(2, 1)
    labels, count = ndimage.label(layers, plus)  # neighbours share a side; the corners of two squares can touch
    where = np.flatnonzero(ndimage.binary_erosion(layers, plus))
    layer = np.full(count + 1, -1)
    layer[labels.reshape(-1)[where]] = where // SIZE**2
    kept = np.flatnonzero(layer >= 0)
    return labels[layer[kept]] == kept[:, None, None], layer[kept]


def _weights(blobs: _Blobs, coverage: Floats) -> Floats:
    """Coverage (M, 32, 32) of each pixel by each blob, soft edge included, in [0, 1].

    Relative to the blob's own full color, so that a paler one keeps its size.
    """
    from scipy import ndimage

    cover = coverage[blobs.picture, blobs.color]
    free = np.ones((len(coverage), SIZE, SIZE), np.bool_)
    np.logical_and.at(free, blobs.picture, ~blobs.mask)
    rim = ndimage.binary_dilation(blobs.mask, np.ones((1, 3, 3), np.bool_)) & free[blobs.picture]
    ranked = np.sort(np.where(blobs.mask, -cover, np.inf).reshape(len(cover), -1), axis=1)
    level = -ranked[np.arange(len(cover)), blobs.mask.sum((1, 2)) // 4]
    return np.where(blobs.mask | rim, cover / level[:, None, None], 0).clip(0, 1).astype(np.float32)


def _views(weights: Floats) -> _Views:
    """Move and scale blobs of weights (M, 32, 32) to a common frame."""
    from scipy import ndimage

    centre = np.arange(SIZE, dtype=np.float32) + 0.5
    area = weights.sum((1, 2))
    x = (weights.sum(1) @ centre) / area
    y = (weights.sum(2) @ centre) / area
    axis = np.sqrt(area)[:, None] * np.linspace(-_REACH, _REACH, _POINTS, dtype=np.float32)
    rows, columns = (y[:, None] + axis - 0.5)[:, :, None], (x[:, None] + axis - 0.5)[:, None, :]
    where = np.broadcast_arrays(np.arange(len(weights))[:, None, None], rows, columns)
    pixels = ndimage.map_coordinates(weights, where, order=1).reshape(len(weights), -1)
    return _Views(pixels, area, x, y)


@cache
def _templates() -> tuple[Ints, Floats, Floats]:
    """Shape index (T,), view (T, 784) and radius at area 1 (T,) of drawn shapes, each averaged over four places."""
    from scipy import ndimage

    kinds = list(itertools.product(range(len(SHAPES)), _TEMPLATE_RADII, _TEMPLATE_BLURS))
    grey = np.full((SIZE, SIZE), 128.0)
    pictures = [
        ndimage.gaussian_filter(
            draw([SceneObject(SHAPES[shape], COLORS[0], 16 + dx, 16 + dy, radius)], grey), (blur, blur, 0)
        )
        for shape, radius, blur in kinds
        for dx, dy in itertools.product((0, 0.5), repeat=2)
    ]
    coverage, nearest = _segment(_reduced(np.stack(pictures)))
    views = _views(_weights(_connected(coverage, nearest), coverage))
    shapes, radii, _ = (np.array(column) for column in zip(*kinds, strict=True))
    area = views.area.reshape(len(kinds), 4).mean(1)
    return shapes, views.pixels.reshape(len(kinds), 4, -1).mean(1), (radii / np.sqrt(area)).astype(np.float32)


def _match(views: _Views) -> tuple[Ints, Floats]:
    """Index in `SHAPES` (M,), -1 where none fits, and radius (M,): by the overlap min / max with the templates."""
    shapes, templates, radii = _templates()
    least = np.stack([np.minimum(views.pixels, template).sum(1) for template in templates], axis=1)
    most = views.pixels.sum(1, keepdims=True) + templates.sum(1) - least  # min(a, b) + max(a, b) = a + b
    fit = least / most
    best = fit.argmax(1)
    radius = np.sqrt(views.area) * radii[best]
    matched = (fit.max(1) >= _MIN_FIT) & (radius >= _MIN_RADIUS)
    return np.where(matched, shapes[best], -1), np.where(matched, radius, np.sqrt(views.area / np.pi))


def _split_touching(blobs: _Blobs, malformed: Masks, coverage: Floats) -> _Blobs:
    """Replace each malformed blob (M,) by its parts where all of these are well formed."""
    whole = _pick(blobs, ~malformed)
    pieces = [whole]
    for i in np.flatnonzero(malformed):
        blob = _pick(blobs, np.array([i]))
        good = (parts for parts in _splits(blob) if (_match(_views(_weights(parts, coverage)))[0] >= 0).all())
        pieces.append(next(good, blob))
    return _Blobs(*(np.concatenate([getattr(p, name) for p in pieces]) for name in ("picture", "color", "mask")))


def _splits(blob: _Blobs) -> Iterator[_Blobs]:
    """Ways to cut one blob (M = 1) into two or more, each pixel going to the nearest core."""
    from scipy import ndimage

    mask = blob.mask[0]
    depth = ndimage.distance_transform_edt(mask)
    for least in _DEPTHS:
        labels, count = ndimage.label(depth >= least)
        nearest = ndimage.distance_transform_edt(labels == 0, return_distances=False, return_indices=True)
        owner = np.where(mask, labels[tuple(nearest)], 0)
        if count > 1:
            parts = owner == np.arange(1, count + 1)[:, None, None]
            yield _Blobs(blob.picture.repeat(count), blob.color.repeat(count), parts)


def _pick(blobs: _Blobs, chosen: Masks | Ints) -> _Blobs:
    return _Blobs(blobs.picture[chosen], blobs.color[chosen], blobs.mask[chosen])
