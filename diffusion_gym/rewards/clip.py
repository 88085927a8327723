"""CLIP as the rewards use it: embeddings of pictures and prompts on the unit sphere, and their cosine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import torch
from torch.nn import functional

from diffusion_gym.rewards.preprocessing import Preprocessing, read_preprocessing
from diffusion_gym.rewards.vision import SharedNetwork, pretrained

_VOCABULARIES: Final = ("tokenizer.json", "vocab.json", "vocab.txt")


def load_clip(source: str, dtype: str, *, argument: str, processor: str | None = None) -> CLIP:
    """A CLIP model with its preprocessing; the weights are shared with every other user of them.

    Args:
        source: local directory or hub id of a `CLIPModel`.
        dtype: type of its weights.
        argument: what the user calls `source`, for errors.
        processor: directory with the tokenizer and image processor; None for the model's own.

    Raises:
        FileNotFoundError: the files are not here and cannot be fetched.
        ValueError: an unknown dtype, or the files are of something else.
    """
    network, folder = pretrained("CLIPModel", source, dtype, argument=argument)
    return CLIP(network, processor or folder)


class CLIP:
    """A CLIP model with its picture and text preprocessing.

    Args:
        network: a `CLIPModel`.
        processor: directory with the tokenizer and image processor.

    Attributes:
        preprocessing: makes pixel values of pictures.
        width: D, numbers of an embedding.

    Raises:
        FileNotFoundError: the directory lacks an image processor.
        ValueError: it cannot be used.
    """

    def __init__(self, network: SharedNetwork, processor: str) -> None:
        self.network = network
        self.preprocessing: Preprocessing = read_preprocessing(processor)
        self._processor = processor
        self.width: int = network.config.projection_dim

    def image_embeddings(self, pixels: torch.Tensor) -> torch.Tensor:
        """Unit vectors, float32 `(n, D)`, of pixel values `(n, 3, h, w)`."""
        network = self.network.on(pixels.device)
        return _unit(network.get_image_features(pixel_values=pixels.to(network.dtype)))

    def text_embeddings(self, prompts: Sequence[str], device: torch.device) -> torch.Tensor:
        """Unit vectors, float32 `(n, D)`, of prompts; what is longer than the model's context is cut."""
        network = self.network.on(device)
        longest = network.config.text_config.max_position_embeddings
        tokens = load_tokenizer(self._processor)(
            list(prompts), padding=True, truncation=True, max_length=longest, return_tensors="pt"
        ).to(device)
        return _unit(network.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]))

    def cosine(self, pixels: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """cos(picture i, prompt i), float32 `(n,)`."""
        return (self.image_embeddings(pixels) * self.text_embeddings(prompts, pixels.device)).sum(1)

    def temperature(self, device: torch.device) -> torch.Tensor:
        """The trained factor exp(logit_scale) of the cosine, a float32 scalar."""
        return self.network.on(device).logit_scale.float().exp()


@lru_cache(maxsize=8)
def load_tokenizer(folder: str) -> Any:
    """The tokenizer that is saved in `folder`.

    Raises:
        FileNotFoundError: there is none.
    """
    from diffusion_gym.quiet import quiet

    # transformers 5 would make an empty tokenizer of a tokenizer_config.json alone.
    if not any(Path(folder, name).is_file() for name in _VOCABULARIES):
        raise FileNotFoundError(f"{folder!r} holds no tokenizer; pass a directory with tokenizer.json")
    with quiet():
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _unit(features: Any) -> torch.Tensor:
    # transformers 5 returns an output whose pooler_output is the projection; 4 returned the projection.
    vectors = features if isinstance(features, torch.Tensor) else features.pooler_output
    return functional.normalize(vectors.float(), dim=1)
