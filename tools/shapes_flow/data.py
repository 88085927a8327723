"""The training set of `ShapesFlow`: latents and token ids of drawn scenes, made once and kept as one file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import CLIPTokenizer

from diffusion_gym.storage import load_tensors, save_tensors
from tools.shapes.autoencoder import encode
from tools.shapes.data import make_pictures
from tools.shapes.denoiser import kind, tokenize
from tools.shapes_flow.networks import load_autoencoder

KINDS: Final = ("color", "count", "composition", "location", "plain location")
_PART: Final = 5_000  # pictures drawn with one seed


@dataclass(frozen=True)
class TrainingSet:
    """Latents float16 `(N, 4, 8, 8)`, int64 tokens `(N, L)`, the empty caption's `(1, L)`, and kinds `(N,)`."""

    latents: torch.Tensor
    tokens: torch.Tensor
    empty: torch.Tensor
    kinds: torch.Tensor

    def pool(self, shares: Mapping[str, float], size: int, generator: torch.Generator) -> torch.Tensor:
        """`size` indices of pictures in which the kinds come by `shares`; what a step draws from."""
        known = [name if name in shares else name.removeprefix("plain ") for name in KINDS]
        named = [known[i] for i in self.kinds.tolist()]
        counts = Counter(named)
        chances = torch.tensor([shares[name] / counts[name] for name in named], dtype=torch.float64)
        return torch.multinomial(chances, size, replacement=True, generator=generator)


def training_set(
    path: Path, tokenizer: CLIPTokenizer, *, number: int, seed: int, workers: int, device: torch.device
) -> TrainingSet:
    """The set kept at `path`, made first where it is not there."""
    if not path.exists():
        save_tensors(path, _make(tokenizer, number, seed, workers, device))
    stored = load_tensors(path)
    return TrainingSet(stored["latents"], stored["tokens"].long(), stored["empty"].long(), stored["kinds"].long())


def _make(
    tokenizer: CLIPTokenizer, number: int, seed: int, workers: int, device: torch.device
) -> dict[str, torch.Tensor]:
    sizes = [min(_PART, number - start) for start in range(0, number, _PART)]
    seeds = [seed * 100_003 + part for part in range(len(sizes))]
    with ProcessPoolExecutor(max(1, workers)) as pool:
        parts = list(pool.map(_draw, sizes, seeds))
    captions = [caption for part, _, _ in parts for caption in part]
    pictures: NDArray[np.uint8] = np.concatenate([drawn for _, drawn, _ in parts])
    kinds = [KINDS.index(name) for _, _, part in parts for name in part]
    vae = load_autoencoder().to(device)
    return {
        "latents": encode(vae, pictures, device).half(),
        "tokens": tokenize(tokenizer, captions).to(torch.int16),
        "empty": tokenize(tokenizer, [""]).to(torch.int16),
        "kinds": torch.tensor(kinds, dtype=torch.int8),
    }


def _draw(number: int, seed: int) -> tuple[list[str], NDArray[np.uint8], list[str]]:
    captions, pictures = make_pictures(number, seed)
    return [str(caption) for caption in captions], pictures, [kind(caption) for caption in captions]
