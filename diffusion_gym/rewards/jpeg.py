"""The file size of a picture as a reward: `Compressibility` and `Incompressibility` (DDPO paper, appendix F.4)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from diffusion_gym.images import to_uint8
from diffusion_gym.rewards.base import REWARDS, RewardOutput

QUALITY: Final = 95


class JpegSize:
    """Scores pictures by their size in kB (1000 bytes) as a JPEG of quality 95.

    Args:
        name: the reward's name.
        sign: 1 where large files are wanted, -1 where small ones are.
    """

    def __init__(self, name: str, sign: int) -> None:
        self.name = name
        self.sign = sign

    def __call__(
        self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> RewardOutput:
        """Score `images`, float `(N, 3, H, W)` in [0, 1]; the size itself is `jpeg_kb` in `info`, float32 `(N,)`."""
        with ThreadPoolExecutor() as pool:  # PIL lets go of the interpreter lock while it encodes
            sizes = list(pool.map(jpeg_kb, to_uint8(images).cpu().numpy()))
        kb = torch.tensor(sizes, dtype=torch.float32, device=images.device)
        return RewardOutput(self.sign * kb, {"jpeg_kb": kb})


def jpeg_kb(picture: NDArray[np.uint8]) -> float:
    """Size of one picture, uint8 `(H, W, 3)`, in kB."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell() / 1000


REWARDS.register("Compressibility")(partial(JpegSize, "Compressibility", sign=-1))
REWARDS.register("Incompressibility")(partial(JpegSize, "Incompressibility", sign=1))
