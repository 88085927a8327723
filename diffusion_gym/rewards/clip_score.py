"""`CLIPScore`: how well a picture fits its prompt (Hessel et al. 2021, "CLIPScore", equation 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from diffusion_gym.hub import REWARD_SOURCES
from diffusion_gym.rewards.base import REWARDS
from diffusion_gym.rewards.clip import load_clip
from diffusion_gym.rewards.vision import VisionReward

(_CLIP,) = REWARD_SOURCES["CLIPScore"]
WEIGHT: Final = 2.5  # w of the paper's equation


@REWARDS.register("CLIPScore", needs=("prompt", "photo"))
def clip_score(
    *, clip: str = _CLIP, prefix: str = "", dtype: str = "float32", device: str | None = None, batch_size: int = 32
) -> VisionReward:
    """Scores `2.5 max(cos(f, g), 0)` in [0, 2.5], with f and g CLIP's embeddings of the picture and the prompt.

    The cosine itself is `cosine` in `info`. Programs that report `100 max(cos, 0)` report 40 times this score.

    Args:
        clip: the `CLIPModel`, a local directory or a hub id. The paper has ViT-B/32 (`openai/clip-vit-base-patch32`).
        prefix: put before each prompt. The paper has "A photo depicts ".
        dtype: type of CLIP's weights.
        device: where it runs; None for the images' device.
        batch_size: most pictures at once.

    Raises:
        FileNotFoundError: weights that are not here and cannot be fetched.
        ValueError: a value out of range.
    """
    tower = load_clip(clip, dtype, argument="reward_kwargs['clip']")

    def score(pixels: torch.Tensor, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        cosine = tower.cosine(pixels, [prefix + prompt for prompt in prompts])
        return {"score": WEIGHT * cosine.clamp(min=0), "cosine": cosine}

    return VisionReward("CLIPScore", tower.preprocessing, score, device=device, batch_size=batch_size)
