"""`ImageReward`: people's preference between pictures of a prompt (Xu et al. 2023, "ImageReward").

The published package pins libraries of 2022. Its network is BLIP with a score head, so the published weights are
read into transformers' own BLIP modules here, under their new names and with none missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

import torch
from torch import nn

from diffusion_gym.hub import REWARD_SOURCES, located, located_file
from diffusion_gym.hub_sources import NAMED_FILES
from diffusion_gym.pretrained import Fingerprint, fingerprint
from diffusion_gym.rewards.base import REWARDS
from diffusion_gym.rewards.clip import load_tokenizer
from diffusion_gym.rewards.preprocessing import clip_preprocessing
from diffusion_gym.rewards.published import not_those_of, number_positions, renamed
from diffusion_gym.rewards.score_mlp import read_weights, score_mlp
from diffusion_gym.rewards.vision import SharedNetwork, VisionReward, checked_dtype

_WEIGHTS, _TOKENIZER = REWARD_SOURCES["ImageReward"]
_WEIGHTS_FILE: Final = NAMED_FILES[_WEIGHTS][0]
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw scores over the authors' data; in their code
PROMPT_LENGTH: Final = 35  # tokens; longer prompts are cut
_HEAD_WIDTH: Final = 64  # of an attention head, in ViT-L and in BERT
_COUNTED: Final = "embeddings.position_ids"  # 0, 1, 2, ...: no weight
# From the names of the published vision transformer to those of transformers.
_RENAMES: Final = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"^norm\.", "post_layernorm."),
)


@REWARDS.register("ImageReward", needs=("prompt", "photo"))
def image_reward(
    *,
    weights: str = _WEIGHTS,
    tokenizer: str = _TOKENIZER,
    dtype: str = "float32",
    device: str | None = None,
    batch_size: int = 32,
) -> VisionReward:
    """Scores `(MLP(h) - mean) / std`, with h BLIP's first text state that has read the picture; mostly in [-2.5, 2].

    Args:
        weights: `ImageReward.pt` or the same as `.safetensors`, a directory with the former, or a hub id.
        tokenizer: BERT's uncased tokenizer, a local directory or a hub id.
        dtype: type of BLIP's weights; the head is always float32.
        device: where it runs; None for the images' device.
        batch_size: most pictures at once.

    Raises:
        FileNotFoundError: weights that are not here and cannot be fetched.
        ValueError: a value out of range, or weights of another network.
    """
    type_ = checked_dtype(dtype)
    file = located_file(weights, _WEIGHTS_FILE, argument="reward_kwargs['weights']")
    tokens_of = load_tokenizer(located(tokenizer, argument="reward_kwargs['tokenizer']", weights=False))
    shared, size = _loaded(file, type_, fingerprint(file))

    def score(pixels: torch.Tensor, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        tokens = tokens_of(
            list(prompts), padding="max_length", truncation=True, max_length=PROMPT_LENGTH, return_tensors="pt"
        ).to(pixels.device)
        network = shared.on(pixels.device)
        raw = network(pixels.to(type_), tokens["input_ids"], tokens["attention_mask"])
        return {"score": (raw - MEAN) / STD}

    return VisionReward("ImageReward", clip_preprocessing(size), score, device=device, batch_size=batch_size)


class ImageRewardNetwork(nn.Module):
    """BLIP's picture-grounded text encoder with the score head.

    Args:
        weights: the published names and tensors.
        dtype: type of BLIP's weights.

    Raises:
        ValueError: a weight is missing, unknown or of the wrong shape.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        vision = {renamed(name, _RENAMES): value for name, value in _below(weights, "blip.visual_encoder.").items()}
        text = _below(weights, "blip.text_encoder.")
        try:
            self.vision = _filled(_blank_vision(vision), vision, dtype)
            self.text = _filled(_blank_text(text, vision), text, dtype)
        except (KeyError, RuntimeError) as error:
            raise not_those_of("the weights are not those of ImageReward", error) from error
        number_positions(self.text.embeddings, self.text.config.max_position_embeddings)
        self.mlp = score_mlp(_below(weights, "mlp."), source="ImageReward's mlp")

    def forward(self, pixels: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Raw scores, float32 `(n,)`, of pixel values `(n, 3, h, w)` and token ids and their mask `(n, L)`."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        states = self.text(
            input_ids=tokens,
            attention_mask=mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
            is_decoder=False,
        ).last_hidden_state
        return self.mlp(states[:, 0].float())


@lru_cache(maxsize=2)
def _loaded(file: str, dtype: torch.dtype, files: Fingerprint) -> tuple[SharedNetwork, int]:
    """The network in `file` and the size of the pictures that it takes."""
    from diffusion_gym.quiet import quiet

    with quiet():
        weights = read_weights(file)
        unknown = [name for name in weights if not name.startswith(("blip.", "mlp."))]
        if unknown:
            raise ValueError(f"{file} holds {unknown[0]!r}, which is no part of ImageReward")
        network = ImageRewardNetwork(weights, dtype)
        return SharedNetwork(network), network.vision.config.image_size


def _below(weights: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """What is named `prefix` and more, under the rest of its name."""
    found = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    return {name: value for name, value in found.items() if name != _COUNTED}


def _filled(blank: Any, weights: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Any:
    blank.load_state_dict({name: value.to(dtype) for name, value in weights.items()}, assign=True)
    return blank.eval()


def _depth(weights: Mapping[str, torch.Tensor], prefix: str) -> int:
    return len({name.split(".")[2] for name in weights if name.startswith(prefix)})


def _blank_vision(weights: Mapping[str, torch.Tensor]) -> Any:
    """BLIP's vision transformer in the shape of `weights`, without values."""
    from transformers import BlipVisionConfig, BlipVisionModel

    width, _, patch, _ = weights["embeddings.patch_embedding.weight"].shape
    patches = weights["embeddings.position_embedding"].shape[1] - 1  # the first is the class token's
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=weights["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_depth(weights, "encoder.layers."),
        num_attention_heads=width // _HEAD_WIDTH,
        image_size=round(patches**0.5) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,  # the published network's; the default of BlipVisionConfig is another
    )
    with torch.device("meta"):
        return BlipVisionModel(config)


def _blank_text(weights: Mapping[str, torch.Tensor], vision: Mapping[str, torch.Tensor]) -> Any:
    """BLIP's text encoder with cross-attention in the shape of `weights`, without values."""
    from transformers import BlipTextConfig
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    vocabulary, width = weights["embeddings.word_embeddings.weight"].shape
    config = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=vision["embeddings.class_embedding"].shape[-1],
        intermediate_size=weights["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_depth(weights, "encoder.layer."),
        num_attention_heads=width // _HEAD_WIDTH,  # the default of BlipTextConfig, 8, is not the published 12
        max_position_embeddings=weights["embeddings.position_embeddings.weight"].shape[0],
        is_decoder=True,  # which makes the cross-attention; the mask is switched back to two-way in each call
        attn_implementation="eager",  # it adds the mask to the scores, so the mask has to be one of numbers
    )
    with torch.device("meta"):
        return BlipTextModel(config, add_pooling_layer=False)
