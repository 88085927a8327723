"""Pictures for a vision model, made by transformers' own image processors.

Always those that resize with Pillow, as the published scores did: with torchvision installed transformers would take
other ones, whose pixels differ. They work on the host; a picture of 512 x 512 takes some 10 ms there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from diffusion_gym.images import to_uint8
from diffusion_gym.quiet import quiet

Preprocessing = Callable[[torch.Tensor], torch.Tensor]
"""Pixel values, float32 `(N, 3, h, w)`, of images, float `(N, 3, H, W)` in [0, 1], on the images' device.

The images pass through 8 bits first, so that an environment's picture scores as its saved PNG does.
"""


def clip_preprocessing(size: int) -> Preprocessing:
    """CLIP's own: the shorter side to `size` pixels (bicubic), centre crop, CLIP's mean and std."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return _applied(CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size}))


def read_preprocessing(folder: str) -> Preprocessing:
    """The preprocessing of the image processor that is saved in `folder`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it does not make pixel values of a picture.
    """
    from transformers import AutoImageProcessor

    try:
        with quiet():
            found = _applied(AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True))
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


def _applied(processor: Any) -> Preprocessing:
    def apply(images: torch.Tensor) -> torch.Tensor:
        pictures = to_uint8(images).cpu().numpy()
        made = processor(list(pictures), return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        return made.float().to(images.device)

    return apply
