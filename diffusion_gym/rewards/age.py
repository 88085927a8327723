"""`Over50` and `Under30`: how old a face looks to a classifier (DDPM thesis, section 5.1.4)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import torch

from diffusion_gym.hub import REWARD_SOURCES
from diffusion_gym.rewards.base import REWARDS
from diffusion_gym.rewards.preprocessing import read_preprocessing
from diffusion_gym.rewards.vision import VisionReward, pretrained

AGES: Final = ("0-2", "3-9", "10-19", "20-29", "30-39", "40-49", "50-59", "60-69", "more than 70")
OVER_50: Final = AGES[6:]
UNDER_30: Final = AGES[:4]
(_CLASSIFIER,) = REWARD_SOURCES["Over50"]


def age(
    name: str,
    wanted: Sequence[str],
    *,
    classifier: str = _CLASSIFIER,
    dtype: str = "float32",
    device: str | None = None,
    batch_size: int = 32,
) -> VisionReward:
    """Scores the sum of the logits of the `wanted` age classes; it has no bound.

    The thesis sums logits instead of probabilities because they keep a slope where the classifier is sure.
    `info` has the probability of each class, `p(50-59)` and so on, and `age_class`, the number of the most probable.

    Args:
        name: the reward's name.
        wanted: names out of `AGES`.
        classifier: a `ViTForImageClassification` of the nine classes, a local directory or a hub id.
        dtype: type of its weights.
        device: where it runs; None for the images' device.
        batch_size: most pictures at once.

    Raises:
        FileNotFoundError: weights that are not here and cannot be fetched.
        ValueError: a value out of range, or a classifier of other classes.
    """
    network, folder = pretrained("ViTForImageClassification", classifier, dtype, argument="reward_kwargs['classifier']")
    labels = _labels(network.config, classifier)
    columns = [labels.index(label) for label in wanted]

    def score(pixels: torch.Tensor, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        vit = network.on(pixels.device)
        logits = vit(pixel_values=pixels.to(vit.dtype)).logits.float()
        chances = logits.softmax(1)
        return {
            "score": logits[:, columns].sum(1),
            "age_class": chances[:, [labels.index(label) for label in AGES]].argmax(1),
            **{f"p({label})": chances[:, labels.index(label)] for label in AGES},
        }

    return VisionReward(name, read_preprocessing(folder), score, device=device, batch_size=batch_size)


def _labels(config: Any, classifier: str) -> list[str]:
    """The classes in the order of the logits."""
    labels = [str(config.id2label[index]) for index in sorted(config.id2label)]
    if sorted(labels) != sorted(AGES):
        raise ValueError(
            f"reward_kwargs['classifier']={classifier!r} has the classes {labels}, not the ages {list(AGES)}; "
            f"use {_CLASSIFIER!r} or a ViT of the same classes"
        )
    return labels


REWARDS.register("Over50", needs=("face",), prompts="portraits")(partial(age, "Over50", OVER_50))
REWARDS.register("Under30", needs=("face",), prompts="portraits")(partial(age, "Under30", UNDER_30))
