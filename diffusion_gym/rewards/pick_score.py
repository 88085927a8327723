"""`PickScore`: which of two pictures people pick for a prompt (Kirstain et al. 2023, "Pick-a-Pic", section 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffusion_gym.hub import REWARD_SOURCES, located
from diffusion_gym.rewards.base import REWARDS
from diffusion_gym.rewards.clip import load_clip
from diffusion_gym.rewards.vision import VisionReward

_CLIP, _PROCESSOR = REWARD_SOURCES["PickScore"]


@REWARDS.register("PickScore", needs=("prompt", "photo"))
def pick_score(
    *,
    clip: str = _CLIP,
    processor: str = _PROCESSOR,
    dtype: str = "float32",
    device: str | None = None,
    batch_size: int = 32,
) -> VisionReward:
    """Scores `T cos(f, g)` with f and g the embeddings of picture and prompt and T the trained temperature.

    Mostly near 20; a difference of d means that the higher picture is picked with probability
    `1 / (1 + exp(-d))`. The cosine itself is `cosine` in `info`.

    Args:
        clip: the `CLIPModel`, a ViT-H/14 tuned on people's picks; a local directory or a hub id.
        processor: where its tokenizer and image processor are, a local directory or a hub id.
        dtype: type of its weights.
        device: where it runs; None for the images' device.
        batch_size: most pictures at once.

    Raises:
        FileNotFoundError: weights that are not here and cannot be fetched.
        ValueError: a value out of range.
    """
    own = located(processor, argument="reward_kwargs['processor']", weights=False)
    tower = load_clip(clip, dtype, argument="reward_kwargs['clip']", processor=own)

    def score(pixels: torch.Tensor, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        cosine = tower.cosine(pixels, prompts)
        return {"score": tower.temperature(pixels.device) * cosine, "cosine": cosine}

    return VisionReward("PickScore", tower.preprocessing, score, device=device, batch_size=batch_size)
