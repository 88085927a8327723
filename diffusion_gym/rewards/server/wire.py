"""What travels between a reward server and its clients: JSON, with pictures as base64 PNG. docs/reward-server.md."""

from __future__ import annotations

import base64
import io
import re
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict, FailFast, Field, PositiveInt

from diffusion_gym.images import as_png, to_uint8
from diffusion_gym.rewards.base import RewardOutput
from diffusion_gym.schemas import Schema, checked
from diffusion_gym.storage import parse_json

TOKEN: Final = "DIFFUSION_GYM_REWARD_TOKEN"
_MOST_PIXELS: Final = 2**22  # of a picture, 2048 x 2048: a PNG of a few kB can unpack to gigabytes
_MOST_VALUES: Final = 2**17  # in a body: an empty object has 3 bytes there and 64 in Python
_MOST_CHUNKS: Final = 2**12  # in a PNG, whose encoders write chunks of 8 kB and more
_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_HEADER: Final = struct.Struct(">8sI4sIIBB")  # signature; length and name of the first chunk; width, height, bits, type
_MODES: Final = {0: "L", 2: "RGB", 3: "P", 4: "LA", 6: "RGBA"}
_UNSEEN: Final = {b"tRNS": "a transparent color", b"acTL": "an animation"}


def check_token(token: str, where: str) -> None:
    """Refuse a token that protects nothing, or that no HTTP header can carry; `where` is what it came from.

    Raises:
        ValueError: it is empty, or holds something else than ASCII letters, digits and signs.
    """
    if not re.fullmatch(r"[!-~]([ -~]*[!-~])?", token):
        what = (
            "holds a character that HTTP headers cannot carry; use ASCII without spaces around it"
            if token
            else "is empty"
        )
        raise ValueError(f"{where} {what}; leave it out for no token")


class _Asked(Schema):
    """The body of a request to score; its lists stop at the first error, each of which takes memory."""

    images: Annotated[list[str], FailFast(), Field(min_length=1)]
    prompts: Annotated[list[str], FailFast()]
    metadata: Annotated[list[dict[str, Any]], FailFast()] = []


class Answer(Schema):
    """What the server answers to it; null is what is not finite."""

    name: str | None = None
    scores: list[float | None]
    info: dict[str, list[float | None]]

    def output(self, number: int, device: torch.device) -> RewardOutput:
        """The output, float32; null is NaN.

        Raises:
            ValueError: it is not that of `number` pictures.
        """
        for name, values in {"scores": self.scores, **self.info}.items():
            if len(values) != number:
                raise ValueError(f"the answer holds {len(values)} {name} for {number} pictures")
        return RewardOutput(_tensor(self.scores, device), {name: _tensor(v, device) for name, v in self.info.items()})


class Health(Schema):
    """What the client needs of the answer to `/health`, which tells people more."""

    model_config = ConfigDict(extra="ignore")

    name: str
    max_batch: PositiveInt
    max_bytes: PositiveInt
    max_unpacked: PositiveInt | None = None
    authorized: bool = True
    needs_metadata: list[str] = []


class BadRequest(ValueError):
    """A request that is JSON, but not one of pictures to score."""


@dataclass(frozen=True)
class ScoreRequest:
    """A batch to score.

    Attributes:
        images: N PNGs as base64, which say that they are 8-bit RGB of one size.
        prompts: N strings.
        metadata: N mappings of JSON values.
        size: height and width.
    """

    images: list[str]
    prompts: list[str]
    metadata: list[dict[str, Any]]
    size: tuple[int, int]

    @property
    def unpacked_bytes(self) -> int:
        """Bytes of the pictures once they are unpacked."""
        return 3 * len(self.images) * self.size[0] * self.size[1]

    def unpack(self) -> torch.Tensor:
        """The pictures, uint8 `(N, H, W, 3)`.

        Raises:
            BadRequest: one of them is not intact.
        """
        pictures = np.empty((len(self.images), *self.size, 3), dtype=np.uint8)

        def fill(index: int) -> None:
            pictures[index] = _decode(self.images[index], index, self.size)

        with ThreadPoolExecutor(4) as pool:  # PIL lets go of the interpreter lock while it decodes
            list(pool.map(fill, range(len(self.images))))
        return torch.from_numpy(pictures)


def encode_images(images: torch.Tensor) -> list[str]:
    """Float `(N, 3, H, W)` in [0, 1] -> N PNGs as base64; rounds to 8 bits, the rest is lossless.

    Raises:
        ValueError: a picture that is not finite, which no PNG can hold.
    """
    if not bool(images.isfinite().all()):
        raise ValueError("images hold NaN or infinite values; `evaluate` leaves such pictures out")
    with ThreadPoolExecutor() as pool:  # PIL lets go of the interpreter lock while it encodes
        return list(pool.map(_encode, to_uint8(images).cpu().numpy()))


def read_request(body: bytes | bytearray, max_batch: int) -> ScoreRequest:
    """The request in a body `{"images": [...], "prompts": [...], "metadata": [...]}`; metadata may be left out.

    Raises:
        BadRequest: it is JSON of something else; the message says what is wrong.
        ValueError: the body is not JSON.
    """
    if sum(map(body.count, b",:[{")) > _MOST_VALUES:
        raise BadRequest(f"the body has more than {_MOST_VALUES} commas, colons and brackets; send fewer pictures")
    found = parse_json(body)
    try:
        asked = checked(_Asked, found, "the body", "docs/reward-server.md shows a request")
    except ValueError as error:
        raise BadRequest(str(error)) from None
    images, prompts, metadata = asked.images, asked.prompts, asked.metadata or [{} for _ in asked.prompts]
    if len(images) > max_batch:
        raise BadRequest(f"{len(images)} images exceed max_batch={max_batch}; send fewer at once")
    if not len(images) == len(prompts) == len(metadata):
        raise BadRequest(
            f"{len(images)} images, {len(prompts)} prompts and {len(metadata)} metadata; give one of each a picture"
        )
    sizes = [_header(image, index) for index, image in enumerate(images)]
    for index, size in enumerate(sizes):
        if size != sizes[0]:
            raise BadRequest(
                f"images[{index}] has height and width {size}, images[0] {sizes[0]}; send one size at once"
            )
    return ScoreRequest(images, prompts, metadata, sizes[0])


def write_output(output: RewardOutput) -> dict[str, Any]:
    """`{"scores": [...], "info": {name: [...]}}` with null for what is not finite."""
    return {"scores": _numbers(output.scores), "info": {name: _numbers(part) for name, part in output.info.items()}}


def _numbers(values: torch.Tensor) -> list[float | None]:
    # A float32 is exactly a Python float, and JSON's shortest decimal reads back as the same one.
    finite = values.isfinite().tolist()
    return [float(value) if good else None for value, good in zip(values.tolist(), finite, strict=True)]


def _tensor(values: list[float | None], device: torch.device) -> torch.Tensor:
    return torch.tensor([torch.nan if value is None else value for value in values], device=device)


def _encode(picture: NDArray[np.uint8]) -> str:
    from PIL import Image

    return base64.b64encode(as_png(Image.fromarray(picture), compress_level=1)).decode("ascii")


def _bytes(text: str, index: int) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise BadRequest(f"images[{index}] is not base64 ({error})") from None


def _header(text: str, index: int) -> tuple[int, int]:
    """Height and width that a PNG claims to have; it is refused before anything is unpacked."""
    start = _bytes(text[:44], index)
    if not start.startswith(_SIGNATURE):
        raise BadRequest(f"images[{index}] is no PNG")
    if len(start) < _HEADER.size:
        raise BadRequest(f"images[{index}] is no intact PNG (it ends in its header)")
    _, length, name, width, height, bits, color = _HEADER.unpack_from(start)
    if length != 13 or name != b"IHDR" or not width or not height:
        raise BadRequest(f"images[{index}] is no intact PNG (it does not begin with its size)")
    if width * height > _MOST_PIXELS:
        raise BadRequest(f"images[{index}] has {width} x {height} pixels; at most {_MOST_PIXELS} are taken")
    if (bits, color) != (8, 2):
        raise BadRequest(
            f"images[{index}] is a {bits}-bit PNG of mode {_MODES.get(color, color)}; convert it to 8-bit RGB"
        )
    return height, width


def _decode(text: str, index: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    from PIL import Image

    data = _bytes(text, index)
    try:
        with Image.open(io.BytesIO(_pixels_only(data, index)), formats=["PNG"]) as image:
            if (image.height, image.width, image.mode) != (*size, "RGB"):
                raise ValueError("it has two headers")
            return np.asarray(image)
    except BadRequest:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # PIL's words name objects of its own
        raise BadRequest(f"images[{index}] is no intact PNG; its pixels cannot be read") from None


def _pixels_only(data: bytes, index: int) -> bytes:
    """A PNG without texts, profiles and private chunks: PIL would keep them, unpacked up to 64 MiB."""
    kept, at = [_SIGNATURE], len(_SIGNATURE)
    for _ in range(_MOST_CHUNKS):
        name = data[at + 4 : at + 8]
        end = at + 12 + int.from_bytes(data[at : at + 4])
        if name in _UNSEEN:
            raise BadRequest(f"images[{index}] holds {_UNSEEN[name]}; convert it to plain 8-bit RGB")
        if len(name) < 4 or name in (b"IHDR", b"IDAT", b"IEND"):
            kept.append(data[at:end])
        if len(name) < 4 or name == b"IEND":
            return b"".join(kept)
        at = end
    raise BadRequest(f"images[{index}] has more than {_MOST_CHUNKS} chunks; write it with larger ones")
