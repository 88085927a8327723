"""What travels between a reward server and its clients: JSON, with pictures as base64 PNG. docs/reward-server.md."""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from diffusion_gym.images import to_uint8
from diffusion_gym.rewards.base import RewardOutput

TOKEN: Final = "DIFFUSION_GYM_REWARD_TOKEN"
_MOST_PIXELS: Final = 2**22  # of a picture, 2048 x 2048: a PNG of a few kB can unpack to gigabytes


class BadRequest(ValueError):
    """A request that is JSON, but not one of pictures to score."""


@dataclass(frozen=True)
class ScoreRequest:
    """A batch to score.

    Attributes:
        pictures: uint8 `(N, H, W, 3)`.
        prompts: N strings.
        metadata: N mappings of JSON values.
    """

    pictures: torch.Tensor
    prompts: list[str]
    metadata: list[Mapping[str, Any]]


def encode_images(images: torch.Tensor) -> list[str]:
    """Float `(N, 3, H, W)` in [0, 1] -> N PNGs as base64; rounds to 8 bits, the rest is lossless.

    Raises:
        ValueError: a picture that is not finite, which no PNG can hold.
    """
    if not bool(images.isfinite().all()):
        raise ValueError("images hold NaN or infinite values; `evaluate` leaves such pictures out")
    with ThreadPoolExecutor() as pool:  # PIL lets go of the interpreter lock while it encodes
        return list(pool.map(_encode, to_uint8(images).cpu().numpy()))


def read_request(body: bytes, max_batch: int) -> ScoreRequest:
    """The request in a body `{"images": [...], "prompts": [...], "metadata": [...]}`; metadata may be left out.

    Raises:
        json.JSONDecodeError, UnicodeDecodeError: the body is not JSON.
        BadRequest: it is JSON of something else; the message says what is wrong.
    """
    found = json.loads(body)
    if not isinstance(found, dict):
        raise BadRequest(f"the body must be a JSON object with images and prompts; it is {type(found).__name__}")
    images, prompts = found.get("images"), found.get("prompts")
    if not isinstance(images, list) or not images or not all(isinstance(image, str) for image in images):
        raise BadRequest("images must be a list of at least one PNG in base64")
    if len(images) > max_batch:
        raise BadRequest(f"{len(images)} images exceed max_batch={max_batch}; send fewer at once")
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise BadRequest("prompts must be a list of strings")
    metadata = found.get("metadata") or [{} for _ in prompts]
    if not isinstance(metadata, list) or not all(isinstance(entry, dict) for entry in metadata):
        raise BadRequest("metadata must be a list of objects, or left out")
    if not len(images) == len(prompts) == len(metadata):
        raise BadRequest(
            f"{len(images)} images, {len(prompts)} prompts and {len(metadata)} metadata; give one of each a picture"
        )
    pictures = [_decode(image, index) for index, image in enumerate(images)]
    for index, picture in enumerate(pictures):
        if picture.shape != pictures[0].shape:
            raise BadRequest(
                f"images[{index}] has shape {picture.shape}, images[0] {pictures[0].shape}; one request has one size"
            )
    return ScoreRequest(torch.from_numpy(np.stack(pictures)), prompts, metadata)


def write_output(output: RewardOutput) -> dict[str, Any]:
    """`{"scores": [...], "info": {name: [...]}}` with null for what is not finite."""
    return {"scores": _numbers(output.scores), "info": {name: _numbers(part) for name, part in output.info.items()}}


def read_output(answer: Any, number: int, device: torch.device) -> RewardOutput:
    """The output in an answer; null is NaN, all parts are float32.

    Raises:
        ValueError: it is no answer for `number` pictures.
    """
    try:
        parts = {None: answer["scores"], **answer["info"]}
        found = {
            name: torch.tensor([float("nan") if value is None else float(value) for value in values], device=device)
            for name, values in parts.items()
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the answer holds no scores ({type(error).__name__}: {error})") from error
    for name, part in found.items():
        if part.shape != (number,):
            raise ValueError(f"the answer holds {len(part)} {name or 'scores'} for {number} pictures")
    return RewardOutput(found.pop(None), {str(name): part for name, part in found.items()})


def _numbers(values: torch.Tensor) -> list[float | None]:
    # A float32 is exactly a Python float, and JSON's shortest decimal reads back as the same one.
    finite = values.isfinite().tolist()
    return [float(value) if good else None for value, good in zip(values.tolist(), finite, strict=True)]


def _encode(picture: NDArray[np.uint8]) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _decode(text: str, index: int) -> NDArray[np.uint8]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise BadRequest(
                    f"images[{index}] has {image.width} x {image.height} pixels; at most {_MOST_PIXELS} are taken"
                )
            if image.mode != "RGB":
                raise BadRequest(f"images[{index}] is a PNG of mode {image.mode}; convert it to 8-bit RGB")
            return np.asarray(image)
    except binascii.Error as error:
        raise BadRequest(f"images[{index}] is not base64 ({error})") from None
    except BadRequest:
        raise
    except UnidentifiedImageError:
        raise BadRequest(f"images[{index}] is no PNG") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadRequest(f"images[{index}] is no intact PNG ({error})") from None
