"""Pictures for a vision model, made by transformers' own image processors.

Always those that resize with Pillow, as the published scores did: with torchvision installed transformers would take
other ones, whose pixels differ. They work on the host; a picture of 512 x 512 takes some 10 ms there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import interpolate

from diffusion_gym.images import to_uint8
from diffusion_gym.quiet import quiet

_MODES = {2: "bilinear", 3: "bicubic"}  # of Pillow's filters
_CLOSE = 0.05  # of normalised pixel values on average: 8 bits, twice rounded, are about 0.01


class Preprocessing:
    """Pixel values, float32 `(N, 3, h, w)`, of images, float `(N, 3, H, W)` in [0, 1], on the images' device.

    The images pass through 8 bits first, so that an environment's picture scores as its saved PNG does. Where they have
    a gradient, the values are the same, and the gradient is that of the same resize, crop and normalisation in real
    numbers (straight through the 8 bits).

    Args:
        processor: an image processor of transformers that works with Pillow.
    """

    def __init__(self, processor: Any) -> None:
        self._processor, self._followed = processor, False

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Preprocess `images`.

        Raises:
            ValueError: they have a gradient, and the processor does something else than resize, crop and normalise.
        """
        pictures = to_uint8(images).cpu().numpy()
        made = self._processor(list(pictures), return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        exact = made.float().to(images.device)
        if not (images.requires_grad and torch.is_grad_enabled()):
            return exact
        smooth = self.smooth(images)
        if not self._followed:  # once: the processor may do more than it is asked for here
            if smooth.shape != exact.shape or (exact - smooth).abs().mean() > _CLOSE:
                raise ValueError(
                    "the image processor does not just resize, crop and normalise; use that of CLIP or ViT"
                )
            self._followed = True
        return smooth + (exact - smooth).detach()

    def smooth(self, images: torch.Tensor) -> torch.Tensor:
        """The same in real numbers, without 8 bits in between and without their bounds; differentiable.

        Raises:
            ValueError: the processor does something else than resize, crop and normalise, or in another way.
        """
        processor = self._processor
        if bool(getattr(processor, "do_resize", False)):
            height, width = _resized(images.shape[2:], dict(processor.size))
            mode = _MODES.get(int(processor.resample))
            if mode is None:
                raise ValueError(f"resample={processor.resample!r} of the image processor has no gradient; use CLIP's")
            images = interpolate(images.float(), (height, width), mode=mode, antialias=True)
        if bool(getattr(processor, "do_center_crop", False)):
            high, wide = int(processor.crop_size["height"]), int(processor.crop_size["width"])
            top, left = (images.shape[2] - high) // 2, (images.shape[3] - wide) // 2
            images = images[:, :, top : top + high, left : left + wide]
        mean, std = (
            torch.tensor(getattr(processor, name), device=images.device) for name in ("image_mean", "image_std")
        )
        return (images.float() - mean[:, None, None]) / std[:, None, None]


def _resized(shape: tuple[int, ...], size: dict[str, int]) -> tuple[int, int]:
    """Height and width after the resize that an image processor's `size` asks for.

    Raises:
        ValueError: it asks for another one.
    """
    if {"height", "width"} <= size.keys():
        return int(size["height"]), int(size["width"])
    if set(size) != {"shortest_edge"}:
        raise ValueError(f"size={size!r} of the image processor has no gradient; use that of CLIP or ViT")
    height, width = shape
    short, edge = min(height, width), int(size["shortest_edge"])
    return (edge, int(edge * width / short)) if height <= width else (int(edge * height / short), edge)


def clip_preprocessing(size: int) -> Preprocessing:
    """CLIP's own: the shorter side to `size` pixels (bicubic), centre crop, CLIP's mean and std."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return Preprocessing(CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size}))


def read_preprocessing(folder: str) -> Preprocessing:
    """The preprocessing of the image processor that is saved in `folder`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it does not make pixel values of a picture.
    """
    from transformers import AutoImageProcessor

    try:
        with quiet():
            found = Preprocessing(AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True))
        shape = found(torch.zeros(1, 3, 64, 48)).shape
        if len(shape) != 4 or shape[:2] != (1, 3):
            raise ValueError(f"it makes values of shape {tuple(shape)} of one RGB picture")
    except OSError as error:
        raise FileNotFoundError(
            f"{folder!r} holds no image processor; pass a directory with preprocessor_config.json"
        ) from error
    except Exception as error:  # many kinds, of whatever the file says
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"the image processor of {folder!r} cannot be used ({reason}); use a checkpoint with that of CLIP or ViT"
        ) from error
    return found
