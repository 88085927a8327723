"""`Aesthetic`: the LAION aesthetic predictor, a head on CLIP's picture embedding (DDPO paper, appendix D.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffusion_gym.hub import REWARD_SOURCES, located_file
from diffusion_gym.hub_sources import NAMED_FILES
from diffusion_gym.rewards.base import REWARDS
from diffusion_gym.rewards.clip import load_clip
from diffusion_gym.rewards.score_mlp import read_weights, score_mlp
from diffusion_gym.rewards.vision import SharedNetwork, VisionReward

_CLIP, _HEAD = REWARD_SOURCES["Aesthetic"]
(_HEAD_FILE,) = NAMED_FILES[_HEAD]


@REWARDS.register("Aesthetic", needs=("photo",), prompts="common-animals")
def aesthetic(
    *, clip: str = _CLIP, head: str = _HEAD, dtype: str = "float32", device: str | None = None, batch_size: int = 32
) -> VisionReward:
    """Rates how people like a picture, mostly between 1 and 10: `MLP(f / |f|)` with f CLIP's embedding of it.

    The head was fitted to people's ratings of 176,000 pictures on CLIP ViT-L/14; it has no bound.

    Args:
        clip: the `CLIPModel`, a local directory or a hub id.
        head: the head: a `.pth` or `.safetensors` file, a directory with `aesthetic-model.pth`, or a hub id.
        dtype: type of CLIP's weights; the head is always float32.
        device: where it runs; None for the images' device.
        batch_size: most pictures at once.

    Raises:
        FileNotFoundError: weights that are not here and cannot be fetched.
        ValueError: a value out of range, or a head that does not fit CLIP's embedding.
    """
    tower = load_clip(clip, dtype, argument="reward_kwargs['clip']")
    file = located_file(head, _HEAD_FILE, argument="reward_kwargs['head']")
    mlp = score_mlp(read_weights(file), source=f"reward_kwargs['head']={head!r}")
    width, expected = tower.width, mlp.layers[0].in_features
    if width != expected:
        raise ValueError(
            f"reward_kwargs['head']={head!r} is for embeddings of {expected} numbers, but clip={clip!r} gives {width}; "
            "use the head that was fitted to this CLIP"
        )
    shared = SharedNetwork(mlp)

    def score(pixels: torch.Tensor, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        return {"score": shared.on(pixels.device)(tower.image_embeddings(pixels))}

    return VisionReward("Aesthetic", tower.preprocessing, score, device=device, batch_size=batch_size)
