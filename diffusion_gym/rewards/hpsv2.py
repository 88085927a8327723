"""`HPSv2`: which pictures of a prompt people prefer (Wu et al. 2023, "Human Preference Score v2", arXiv:2306.09341).

The published file holds CLIP ViT-H/14, tuned on people's choices, under the names of open_clip. It is read into
transformers' CLIP here, with none of its weights missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

import torch
from torch.nn.functional import pad

from diffusion_gym.hub import REWARD_SOURCES, located, located_file
from diffusion_gym.hub_sources import NAMED_FILES
from diffusion_gym.pretrained import Fingerprint, fingerprint
from diffusion_gym.rewards.base import REWARDS
from diffusion_gym.rewards.clip import CLIP, load_tokenizer
from diffusion_gym.rewards.published import not_those_of, number_positions, renamed
from diffusion_gym.rewards.score_mlp import read_weights
from diffusion_gym.rewards.vision import SharedNetwork, VisionReward, checked_dtype

_WEIGHTS, _PROCESSOR = REWARD_SOURCES["HPSv2"]
_WEIGHTS_FILE: Final = NAMED_FILES[_WEIGHTS][0]
_HEAD_WIDTHS: Final = {"vision": 80, "text": 64}  # of an attention head, in ViT-H/14
_COMPUTED: Final = "attn_mask"  # the causal mask: no weight
# From open_clip's names to those of transformers; the vision tower's stand below `visual.`.
_RENAMES: Final = (
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
_TRANSPOSED: Final = ("visual.proj", "text_projection")


@REWARDS.register("HPSv2", needs=("prompt", "photo"))
def hpsv2(
    *,
    weights: str = _WEIGHTS,
    processor: str = _PROCESSOR,
    dtype: str = "float32",
    device: str | None = None,
    batch_size: int = 32,
) -> VisionReward:
    """Scores cos(f, g) with f and g the tuned embeddings of picture and prompt; mostly between 0.2 and 0.35.

    As the authors' `hpsv2.score`, which leaves the temperature out. A picture that is not square gets black bars.

    Args:
        weights: `HPS_v2.1_compressed.pt`, or that of v2.0, or the same as `.safetensors`; a directory with the former,
            or a hub id.
        processor: where CLIP ViT-H/14's tokenizer and image processor are, a local directory or a hub id.
        dtype: type of its weights.
        device: where it runs; None for the images' device.
        batch_size: most pictures at once.

    Raises:
        FileNotFoundError: weights that are not here and cannot be fetched.
        ValueError: a value out of range, or weights of another network.
    """
    type_ = checked_dtype(dtype)
    file = located_file(weights, _WEIGHTS_FILE, argument="reward_kwargs['weights']")
    folder = located(processor, argument="reward_kwargs['processor']", weights=False)
    tower = CLIP(_loaded(file, type_, folder, fingerprint(file)), folder)

    def score(pixels: torch.Tensor, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        return {"score": tower.cosine(pixels, prompts)}

    def preprocessing(images: torch.Tensor) -> torch.Tensor:
        return tower.preprocessing(_squared(images))

    return VisionReward("HPSv2", preprocessing, score, device=device, batch_size=batch_size)


def _squared(images: torch.Tensor) -> torch.Tensor:
    """Images with black bars on the shorter sides."""
    height, width = images.shape[2:]
    wide, high = max(height - width, 0), max(width - height, 0)
    return pad(images, (wide // 2, wide - wide // 2, high // 2, high - high // 2)) if wide or high else images


@lru_cache(maxsize=2)
def _loaded(file: str, dtype: torch.dtype, processor: str, files: Fingerprint) -> SharedNetwork:
    """The network in `file`, which reads the tokens of `processor`."""
    from diffusion_gym.quiet import quiet

    weights = read_weights(file, below="state_dict")
    try:
        named = dict(_renamed(weights))
        with quiet(), torch.device("meta"):
            network = _blank(named, load_tokenizer(processor))
        scale = named.pop("logit_scale").float()
        network.load_state_dict(
            {name: value.to(dtype) for name, value in named.items()} | {"logit_scale": scale}, assign=True
        )
    except (KeyError, RuntimeError) as error:
        raise not_those_of(f"{file} does not hold the weights of HPSv2", error) from error
    for tower in (network.text_model, network.vision_model):
        number_positions(tower.embeddings, tower.embeddings.position_embedding.num_embeddings)
    return SharedNetwork(network)


def _renamed(weights: Mapping[str, torch.Tensor]) -> Any:
    """Pairs of transformers' names and tensors."""
    for name, value in weights.items():
        if name == _COMPUTED:
            continue
        new = name.removeprefix("module.")
        value = value.T.contiguous() if new in _TRANSPOSED else value
        new = renamed(new, _RENAMES)
        if ".attn.in_proj_" in new:  # query, key and value in one
            for part, own in zip("qkv", value.chunk(3), strict=True):
                yield new.replace(".attn.in_proj_", f".self_attn.{part}_proj."), own.clone()
        else:
            yield new, value


def _blank(weights: Mapping[str, torch.Tensor], tokenizer: Any) -> Any:
    """A CLIP in the shape of `weights`, without values, for the ids of `tokenizer`."""
    from transformers import CLIPConfig, CLIPModel

    def tower(part: str, width: int) -> dict[str, Any]:
        layers = {name.split(".")[3] for name in weights if name.startswith(f"{part}_model.encoder.layers.")}
        return {
            "hidden_size": width,
            "intermediate_size": weights[f"{part}_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
            "num_hidden_layers": len(layers),
            "num_attention_heads": width // _HEAD_WIDTHS[part],
            "hidden_act": "gelu",
        }

    vocabulary, text = weights["text_model.embeddings.token_embedding.weight"].shape
    vision, _, patch, _ = weights["vision_model.embeddings.patch_embedding.weight"].shape
    # The first place is the class token's.
    patches = weights["vision_model.embeddings.position_embedding.weight"].shape[0] - 1
    places = weights["text_model.embeddings.position_embedding.weight"].shape[0]
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return CLIPModel(
        CLIPConfig(
            text_config={**tower("text", text), "vocab_size": vocabulary, "max_position_embeddings": places, **ids},
            vision_config={
                **tower("vision", vision),
                "image_size": round(patches**0.5) * patch,
                "patch_size": patch,
            },
            projection_dim=weights["text_projection.weight"].shape[0],
        )
    ).eval()
