"""The head that turns an embedding into one score: LAION's aesthetic predictor, and ImageReward after it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from torch import nn

from diffusion_gym.storage import load_tensors

_WIDTHS: Final = (1024, 128, 64, 16, 1)


class ScoreMLP(nn.Module):
    """Linear layers D-1024-128-64-16-1 without activations; the published weights call them 0, 2, 4, 6 and 7.

    The gaps in the numbers are dropouts, which act in training only.

    Args:
        width: D, of the embedding.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        gap = nn.Identity()
        first, second, third, fourth, last = (
            nn.Linear(before, after) for before, after in zip((width, *_WIDTHS), _WIDTHS, strict=False)
        )
        self.layers = nn.Sequential(first, gap, second, gap, third, gap, fourth, last)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Scores `(N,)` of embeddings `(N, D)`."""
        return self.layers(embeddings).squeeze(1)


def score_mlp(weights: Mapping[str, torch.Tensor], *, source: str) -> ScoreMLP:
    """The head with `weights`, float32; `source` is their name in errors.

    Raises:
        ValueError: the names or shapes are not those of the head.
    """
    try:
        mlp = ScoreMLP(weights["layers.0.weight"].shape[1])
        mlp.load_state_dict(dict(weights), assign=True)
    except (KeyError, IndexError, RuntimeError) as error:
        lines = str(error).splitlines()
        raise ValueError(
            f"{source} does not hold the weights layers.0, 2, 4, 6 and 7 of a D-1024-128-64-16-1 head "
            f"({lines[-1].strip()})"
        ) from error
    return mlp.float()


def read_weights(path: str | Path, *, below: str | None = None) -> dict[str, torch.Tensor]:
    """Named tensors of a `.safetensors` file, or of a `.pth` or `.pt` file that holds nothing but tensors.

    Args:
        path: the file.
        below: the key under which a `.pth` or `.pt` file may have them.

    Raises:
        ValueError: the file is damaged, or holds other things than tensors.
    """
    if Path(path).suffix == ".safetensors":
        return load_tensors(path)
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds; each means: not to be read safely
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path} is no file of tensors that can be read safely ({reason})") from error
    if below is not None and isinstance(weights, Mapping):
        weights = weights.get(below, weights)
    if not isinstance(weights, Mapping) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(f"{path} holds {type(weights).__name__}, not named tensors; save the model's state_dict")
    return dict(weights)
