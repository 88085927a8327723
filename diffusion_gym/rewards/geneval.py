"""`GenEval`: objects, their number, colours and places, as a detector finds them (Ghosh et al. 2023, "GenEval")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, Final

import torch
from torch.nn import functional

from diffusion_gym.hub import REWARD_SOURCES
from diffusion_gym.images import to_float, to_uint8
from diffusion_gym.rewards.base import REWARDS, RewardOutput
from diffusion_gym.rewards.clip import load_clip
from diffusion_gym.rewards.detector import Detector
from diffusion_gym.rewards.geneval_rules import COLORS, THRESHOLD, Detected, judge, kept, read_task
from diffusion_gym.rewards.vision import checked_device

_DETECTOR, _CLIP = REWARD_SOURCES["GenEval"]
_TEMPLATES: Final = (
    "a photo of a {color} {name}",
    "a photo of a {color}-colored {name}",
    "a photo of a {color} object",
)
_GRAY: Final = 0x99 / 255  # hides what is not the object


@REWARDS.register("GenEval", needs=("prompt", "photo"), prompts="geneval-like")
class GenEval:
    """Scores 1 where a picture shows all that its prompt's metadata ask for, else 0; see `geneval_rules`.

    The authors have mmdet's Mask2Former with Swin-S, where the default here is that of transformers, and CLIP ViT-L/14
    for the colours: the likeliest of ten for the object on grey.

    Args:
        detector: a Mask2Former for instances, or RT-DETR or the like; a local directory or a hub id.
        clip: the `CLIPModel` that tells colours; a local directory or a hub id.
        strict: False scores the share of the conditions that hold.
        dtype: type of the weights.
        device: where they run; None for the images' device.
        batch_size: most pictures at once.

    Raises:
        FileNotFoundError: weights that are not here and cannot be fetched.
        ValueError: a value out of range, or a network of another kind.
    """

    name = "GenEval"
    needs_metadata = ("include",)

    def __init__(
        self,
        *,
        detector: str = _DETECTOR,
        clip: str = _CLIP,
        strict: bool = True,
        dtype: str = "float32",
        device: str | None = None,
        batch_size: int = 8,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r} must be at least 1")
        self.device = None if device is None else checked_device(device)
        self.strict, self.batch_size = strict, batch_size
        self.detector = Detector(detector, dtype)
        self.clip = load_clip(clip, dtype, argument="reward_kwargs['clip']")
        self._text = lru_cache(maxsize=512)(self._color_embeddings)

    def check_prompt(self, prompt: str, metadata: Mapping[str, Any]) -> None:
        """Refuse metadata that are not GenEval's, or a class that the detector does not know; see `Reward`."""
        read_task(prompt, metadata, self.detector.classes)

    @torch.no_grad()
    def __call__(
        self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> RewardOutput:
        """Score `images`, float `(N, 3, H, W)` in [0, 1].

        Returns:
            The scores, and in `info` whether a picture is `correct` and the `share` of its conditions that hold; all
            float32 `(N,)`.

        Raises:
            ValueError: metadata that are not GenEval's.
        """
        classes = self.detector.classes
        tasks = [read_task(prompt, told, classes) for prompt, told in zip(prompts, metadata, strict=True)]
        device, pictures = self.device or images.device, to_uint8(images)
        verdicts = []
        for start in range(0, len(tasks), self.batch_size):
            part = pictures[start : start + self.batch_size]
            found = self.detector(part.cpu().numpy(), THRESHOLD, device)
            for task, picture, detections in zip(tasks[start:], to_float(part).to(device), found, strict=False):
                colors_of = partial(self.colors, picture)
                verdicts.append(judge(task, kept(detections, task.threshold), colors_of))
        correct = torch.tensor([float(verdict.correct) for verdict in verdicts])
        share = torch.tensor([verdict.held / verdict.asked for verdict in verdicts])
        return RewardOutput(correct if self.strict else share, {"correct": correct, "share": share})

    def colors(self, picture: torch.Tensor, name: str, objects: Sequence[Detected]) -> list[str]:
        """The colour of each of some objects of class `name` in a picture, float `(3, H, W)` in [0, 1]."""
        pixels = torch.cat([self.clip.preprocessing(_cut_out(picture, one)[None]) for one in objects])
        likeness = self.clip.image_embeddings(pixels) @ self._text(name, picture.device).T
        return [COLORS[index] for index in likeness.argmax(1).tolist()]

    def _color_embeddings(self, name: str, device: torch.device) -> torch.Tensor:
        """A unit vector for each of `COLORS`, the mean over the sentences: `(10, D)`."""
        texts = [template.format(color=color, name=name) for color in COLORS for template in _TEMPLATES]
        embedded = self.clip.text_embeddings(texts, device)
        return functional.normalize(embedded.unflatten(0, (len(COLORS), -1)).mean(1), dim=1)


def _cut_out(picture: torch.Tensor, detected: Detected) -> torch.Tensor:
    """The object's box, `(3, h, w)`, grey where its mask is not."""
    height, width = picture.shape[1:]
    if detected.mask is not None:
        picture = torch.where(detected.mask.to(picture.device), picture, _GRAY)
    left, top, right, bottom = (round(side) for side in detected.box)
    left, top = min(max(left, 0), width - 1), min(max(top, 0), height - 1)
    return picture[:, top : max(bottom, top + 1), left : max(right, left + 1)]
