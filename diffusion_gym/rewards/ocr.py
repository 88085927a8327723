"""`OCR`: whether a picture shows the text that its prompt asks for, as PP-OCRv4 reads it (Flow-GRPO, arXiv:2505.05470).

The networks come with the package rapidocr-onnxruntime, so nothing is downloaded. With its own settings nearly all the
time goes into the text detector, which enlarges every picture to 736 pixels: 0.43 s of CPU time a picture, and 0.05 s
at 256 pixels, which reads rendered text no worse. Several pictures in one call of a network took up to twice the time
of one after another, so the threads that PyTorch may use take a picture each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Final, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from diffusion_gym.images import to_uint8
from diffusion_gym.rewards.base import REWARDS, RewardOutput

Rule = Literal["edit", "flow_grpo"]
_QUOTED: Final = re.compile(r'"([^"]+)"|\u201c([^\u201d]+)\u201d')
_LINE: Final = (3, 48, 160)  # of the recogniser's input, which grows with a longer line; the package has 320
_HIGHEST_SIDE: Final = 2000  # the package makes larger pictures smaller than this


@REWARDS.register("OCR", needs=("prompt", "photo"), prompts="ocr")
class OCR:
    """Scores `1 - d / max(n, m)`: d edits lead from the text read, of m characters, to that asked for, of n; in [0, 1].

    The text asked for is `text` of the prompt's metadata, else what stands in double quotes in the prompt.

    Args:
        rule: `edit`, or `flow_grpo`, which divides by n, cuts at 0, and gives 1 where the text is part of what is read.
        ignore_case: read capital letters as small ones.
        ignore_spaces: leave spaces out; the recogniser misses some between words.
        detector_side: the shorter side, in pixels, that a smaller picture is enlarged to where text is looked for.
        min_confidence: lines that are read with less are left out.

    Attributes:
        read: what was read in the last pictures, lines joined by spaces.

    Raises:
        ValueError: the package is not installed or cannot be loaded, or a value is out of range.
    """

    name = "OCR"

    def __init__(
        self,
        *,
        rule: Rule = "edit",
        ignore_case: bool = True,
        ignore_spaces: bool = True,
        detector_side: int = 256,
        min_confidence: float = 0.5,
    ) -> None:
        if find_spec("rapidocr_onnxruntime") is None:
            raise ValueError("reward='OCR' needs rapidocr-onnxruntime; pip install 'diffusion-denoise-gym[ocr]'")
        if rule not in get_args(Rule):
            raise ValueError(f"rule={rule!r} must be one of {', '.join(get_args(Rule))}")
        if not 32 <= detector_side <= _HIGHEST_SIDE:
            raise ValueError(f"detector_side={detector_side!r} must be from 32 to {_HIGHEST_SIDE}")
        if not 0 <= min_confidence <= 1:
            raise ValueError(f"min_confidence={min_confidence!r} must be from 0 to 1")
        self.rule, self.ignore_case, self.ignore_spaces = rule, ignore_case, ignore_spaces
        self._read = _reader(detector_side, float(min_confidence))
        self.read: list[str] = []

    def __call__(
        self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> RewardOutput:
        """Score `images`, float `(N, 3, H, W)` in [0, 1].

        Returns:
            The scores, and in `info` the `distance` in edits and whether the text is `exact`; all float32 `(N,)`.

        Raises:
            ValueError: a prompt asks for no text.
        """
        wanted = [asked_text(prompt, told) for prompt, told in zip(prompts, metadata, strict=True)]
        with ThreadPoolExecutor(max(1, torch.get_num_threads())) as threads:
            self.read = list(threads.map(self._read, to_uint8(images).cpu().numpy()))
        pairs = [(self._plain(read), self._plain(text)) for read, text in zip(self.read, wanted, strict=True)]
        distances = [edit_distance(*pair) for pair in pairs]
        scores = [self._score(*pair, distance) for pair, distance in zip(pairs, distances, strict=True)]
        exact = torch.tensor([read == text for read, text in pairs], dtype=torch.float32)
        return RewardOutput(torch.tensor(scores), {"distance": torch.tensor(distances), "exact": exact})

    @staticmethod
    def check_prompt(prompt: str, metadata: Mapping[str, Any]) -> None:
        """Refuse a prompt that asks for no text; see `Reward`."""
        asked_text(prompt, metadata)

    def _plain(self, text: str) -> str:
        text = text.casefold() if self.ignore_case else text
        return "".join(text.split()) if self.ignore_spaces else " ".join(text.split())

    def _score(self, read: str, text: str, distance: int) -> float:
        if self.rule == "edit":
            return 1.0 - distance / max(len(read), len(text))
        return 1.0 if text in read else max(0.0, 1.0 - distance / len(text))


def asked_text(prompt: str, metadata: Mapping[str, Any]) -> str:
    """The text that a picture is to show.

    Args:
        prompt: its part in double quotes is the text; of several, all in turn.
        metadata: with the key `text`, that is the text.

    Raises:
        ValueError: neither says a text.
    """
    text = metadata.get("text")
    if text is None:
        text = " ".join(straight or curly for straight, curly in _QUOTED.findall(prompt))
    if not isinstance(text, str) or not text.strip():
        raise ValueError(
            f"prompt={prompt!r} asks for no text (metadata: text={metadata.get('text')!r}); put it in double quotes, "
            "or give 'text' in the prompt's metadata, as prompts='ocr' does"
        )
    return text


def edit_distance(first: str, second: str) -> int:
    """Levenshtein's distance: the fewest characters to insert, delete or replace."""
    row = list(range(len(second) + 1))
    for number, one in enumerate(first, 1):
        corner, row[0] = row[0], number
        for place, other in enumerate(second, 1):
            corner, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, corner + (one != other))
    return row[-1]


@lru_cache(maxsize=4)
def _reader(detector_side: int, min_confidence: float) -> Any:
    """A function that reads a picture, uint8 `(H, W, 3)`; several threads may call it."""
    try:
        from rapidocr_onnxruntime import RapidOCR
    except ImportError as error:  # of OpenCV, on a machine without a screen
        raise ValueError(
            f"reward='OCR': the package rapidocr-onnxruntime cannot be loaded ({error}); its OpenCV takes the system's "
            "libGL and glib (apt install libgl1 libglib2.0-0), or opencv-python-headless in place of opencv-python"
        ) from error

    engine = RapidOCR(
        det_limit_side_len=detector_side,
        rec_img_shape=list(_LINE),
        text_score=min_confidence,
        intra_op_num_threads=1,
        inter_op_num_threads=1,
    )

    def read(picture: NDArray[np.uint8]) -> str:
        # Blue first, as OpenCV has it. Whether a line stands on its head is not asked.
        lines, _ = engine(np.ascontiguousarray(picture[..., ::-1]), use_cls=False)
        return " ".join(text for _, text, *_ in lines or ())

    return read
