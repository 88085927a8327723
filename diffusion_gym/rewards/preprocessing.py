"""Pictures for a vision model, made as its own image processor makes them, in a batch and on the pictures' device.

The processors of transformers resize one picture after the other with Pillow. This is the same arithmetic on tensors:
a horizontal and a vertical pass of Pillow's antialiased filters, each rounded to 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch.nn import functional

from diffusion_gym.images import to_float, to_uint8

CLIP_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Final = (0.26862954, 0.26130258, 0.27577711)
_FILTERS: Final[dict[int, Literal["bilinear", "bicubic"]]] = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop in the centre, normalise.

    Attributes:
        size: height and width to resize to, or one number: the length of the shorter side, the aspect kept.
        crop: height and width of the centre crop; None for no crop.
        filter: the antialiased filter of the resize.
        mean: of each channel in [0, 1], subtracted.
        std: of each channel, divided by.
    """

    size: int | tuple[int, int]
    crop: tuple[int, int] | None
    filter: Literal["bilinear", "bicubic"]
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Pixel values, float32 `(N, 3, h, w)`, of `images`, float `(N, 3, H, W)` in [0, 1].

        The images pass through 8 bits first, so that an environment's picture scores as its saved PNG does.
        """
        pictures = self._resized(_eight_bits(images))
        if self.crop is not None:
            top, left = ((have - want) // 2 for have, want in zip(pictures.shape[2:], self.crop, strict=True))
            pictures = pictures[:, :, top : top + self.crop[0], left : left + self.crop[1]]
        mean, std = (pictures.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pictures - mean) / std

    def _resized(self, pictures: torch.Tensor) -> torch.Tensor:
        height, width = pictures.shape[2:]
        new_height, new_width = self._target(height, width)
        if new_width != width:
            pictures = self._pass(pictures, (height, new_width))
        if new_height != height:
            pictures = self._pass(pictures, (new_height, new_width))
        return pictures

    def _pass(self, pictures: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        # Pillow rounds to 8 bits after each of its two passes.
        return _eight_bits(functional.interpolate(pictures, size, mode=self.filter, antialias=True))

    def _target(self, height: int, width: int) -> tuple[int, int]:
        if not isinstance(self.size, int):
            return self.size
        short = min(height, width)
        return self.size * height // short, self.size * width // short


def clip_preprocessing(size: int) -> Preprocessing:
    """CLIP's own: the shorter side to `size` pixels (bicubic), centre crop, CLIP's mean and std."""
    return Preprocessing(size, (size, size), "bicubic")


def read_preprocessing(folder: str) -> Preprocessing:
    """The preprocessing of the image processor that is saved in `folder`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the processor does something else than resize, centre crop and normalise.
    """
    from diffusion_gym.quiet import quiet

    with quiet():
        from transformers import AutoImageProcessor

        try:
            config = AutoImageProcessor.from_pretrained(folder, use_fast=False, local_files_only=True).to_dict()
        except OSError as error:
            raise FileNotFoundError(
                f"{folder!r} holds no image processor; pass a directory with preprocessor_config.json"
            ) from error
    try:
        return _from_config(config)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"the image processor of {folder!r} is not a resize, centre crop and normalise of RGB pictures "
            f"({error}); use a checkpoint with the processor of CLIP or ViT"
        ) from error


def _from_config(config: Mapping[str, Any]) -> Preprocessing:
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if not config.get(step, True):
            raise ValueError(f"{step} is off")
    if config.get("do_pad") or abs(config.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3:
        raise ValueError("it pads, or rescales by other than 1/255")
    size = _size(config["size"])
    crop = _size(config["crop_size"]) if config.get("do_center_crop") else None
    if isinstance(crop, int) or (crop and max(crop) > (size if isinstance(size, int) else min(size))):
        raise ValueError(f"crop_size={config['crop_size']!r} is larger than size={config['size']!r}")
    filter_ = _FILTERS[int(config["resample"])]
    return Preprocessing(size, crop, filter_, tuple(config["image_mean"]), tuple(config["image_std"]))


def _size(value: Mapping[str, int]) -> int | tuple[int, int]:
    given = {key: number for key, number in dict(value).items() if number is not None}
    return given["shortest_edge"] if set(given) == {"shortest_edge"} else (given["height"], given["width"])


def _eight_bits(images: torch.Tensor) -> torch.Tensor:
    return to_float(to_uint8(images))
