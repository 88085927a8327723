"""Stable Diffusion 1.4's exact networks with random weights, for measurements; nothing is downloaded.

The sizes are those of the published configs of `CompVis/stable-diffusion-v1-4`: 859,520,964 parameters in the UNet,
123,060,480 in the text encoder and 83,653,863 in the VAE.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from diffusion_gym.quiet import quiet
from diffusion_gym.storage import read_json, write_json

_VOCABULARY: Final = 49_408
_MAX_TOKENS: Final = 77


def sd14_networks() -> dict[str, Callable[[], Any]]:
    """The three networks by their part's name; under `torch.device("meta")` they take no memory."""
    with quiet():
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

    def unet() -> Any:
        return UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            cross_attention_dim=768,
            attention_head_dim=8,
        )

    def vae() -> Any:
        return AutoencoderKL(
            sample_size=512,
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            scaling_factor=0.18215,
        )

    def text_encoder() -> Any:
        return CLIPTextModel(
            CLIPTextConfig(
                vocab_size=_VOCABULARY,
                hidden_size=768,
                intermediate_size=3072,
                projection_dim=768,
                num_hidden_layers=12,
                num_attention_heads=12,
                max_position_embeddings=_MAX_TOKENS,
                bos_token_id=_VOCABULARY - 2,
                eos_token_id=_VOCABULARY - 1,
                pad_token_id=_VOCABULARY - 1,
            )
        )

    return {"unet": unet, "vae": vae, "text_encoder": text_encoder}


def write_random_sd14(folder: str | Path, seed: int = 0, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write a `StableDiffusionPipeline` of SD 1.4's shape: 4x64x64 latents, 512x512 pictures; 4.3 GB in float32.

    Args:
        folder: where to.
        seed: seed of the weights.
        dtype: type of the weights.

    Returns:
        The folder.
    """
    folder = Path(folder)
    with quiet():
        from diffusers import PNDMScheduler, StableDiffusionPipeline

        torch.manual_seed(seed)
        StableDiffusionPipeline(
            **{part: build().to(dtype) for part, build in sd14_networks().items()},
            tokenizer=_spelling_tokenizer(folder / "tokenizer"),
            scheduler=PNDMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                skip_prk_steps=True,
                set_alpha_to_one=False,
                steps_offset=1,
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)
    scheduler = folder / "scheduler" / "scheduler_config.json"  # the published one has this, which PNDM itself ignores
    write_json(scheduler, {**read_json(scheduler), "clip_sample": False})
    return folder


def _spelling_tokenizer(folder: Path) -> Any:
    """A tokenizer as large as CLIP's that spells: CLIP's own merges are not at hand, random weights need none."""
    from transformers import CLIPTokenizer

    from diffusion_gym.models.shapes.vocabulary import BOS, EOS

    letters = [chr(code) for code in range(33, 127)]
    symbols = [*letters, *(letter + "</w>" for letter in letters)]
    unused = [f"<|unused{index}|>" for index in range(_VOCABULARY - 2 - len(symbols))]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {symbol: index for index, symbol in enumerate([*symbols, *unused, BOS, EOS])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=_MAX_TOKENS, pad_token=EOS
    )
    tokenizer.save_pretrained(folder)
    return tokenizer
