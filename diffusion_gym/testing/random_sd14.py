"""Stable Diffusion 1.4's networks with random weights, exact or narrow, for measurements; nothing is downloaded.

The exact sizes are those of the published configs of `CompVis/stable-diffusion-v1-4`: 859,520,964 parameters in the
UNet, 123,060,480 in the text encoder and 83,653,863 in the VAE.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from diffusion_gym.models.quiet import quiet
from diffusion_gym.models.saving import export_pipeline
from diffusion_gym.storage import read_json, write_json

_VOCABULARY: Final = 49_408
_MAX_TOKENS: Final = 77
_ENDS: Final = ("<|startoftext|>", "<|endoftext|>")


@dataclass(frozen=True)
class Widths:
    """The sizes of the three networks; by default the published ones.

    Attributes:
        latents: height and width of the latents.
        unet: channels of the UNet's blocks; the last has no attention.
        vae: channels of the VAE's blocks; a picture has 2^(blocks - 1) pixels a latent, each way.
        text: width of the text embeddings.
        text_layers: layers of the text encoder.
        layers: layers of a block.
        heads: heads of each attention of the UNet.
        groups: groups of the normalisations.
    """

    latents: int = 64
    unet: tuple[int, ...] = (320, 640, 1280, 1280)
    vae: tuple[int, ...] = (128, 256, 512, 512)
    text: int = 768
    text_layers: int = 12
    layers: int = 2
    heads: int = 8
    groups: int = 32


SD14: Final = Widths()
SMALL: Final = Widths(16, (32, 64, 64, 64), (16, 32, 32), 64, 2, 1, 4, 16)  # an iteration on a CPU takes seconds


def sd14_networks(widths: Widths = SD14) -> dict[str, Callable[[], Any]]:
    """The three networks by their part's name; under `torch.device("meta")` they take no memory."""
    with quiet():
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

    def unet() -> Any:
        return UNet2DConditionModel(
            sample_size=widths.latents,
            block_out_channels=widths.unet,
            layers_per_block=widths.layers,
            cross_attention_dim=widths.text,
            attention_head_dim=widths.heads,
            norm_num_groups=widths.groups,
        )

    def vae() -> Any:
        return AutoencoderKL(
            sample_size=widths.latents * 2 ** (len(widths.vae) - 1),
            block_out_channels=widths.vae,
            down_block_types=("DownEncoderBlock2D",) * len(widths.vae),
            up_block_types=("UpDecoderBlock2D",) * len(widths.vae),
            layers_per_block=widths.layers,
            norm_num_groups=widths.groups,
            latent_channels=4,
            scaling_factor=0.18215,
        )

    def text_encoder() -> Any:
        return CLIPTextModel(
            CLIPTextConfig(
                vocab_size=_VOCABULARY,
                hidden_size=widths.text,
                intermediate_size=4 * widths.text,
                projection_dim=widths.text,
                num_hidden_layers=widths.text_layers,
                num_attention_heads=widths.text // 64,
                max_position_embeddings=_MAX_TOKENS,
                bos_token_id=_VOCABULARY - 2,
                eos_token_id=_VOCABULARY - 1,
                pad_token_id=_VOCABULARY - 1,
            )
        )

    return {"unet": unet, "vae": vae, "text_encoder": text_encoder}


def write_random_sd14(
    folder: str | Path, seed: int = 0, *, dtype: torch.dtype = torch.float32, widths: Widths = SD14
) -> Path:
    """Write a `StableDiffusionPipeline` of SD 1.4's shape: 4x64x64 latents, 512x512 pictures; 4.3 GB in float32.

    Args:
        folder: where to.
        seed: seed of the weights.
        dtype: type of the weights.
        widths: sizes of the networks.

    Returns:
        The folder.
    """
    folder = Path(folder)
    with quiet():
        from diffusers import PNDMScheduler, StableDiffusionPipeline

        torch.manual_seed(seed)
        pipeline = StableDiffusionPipeline(
            **{part: build().to(dtype) for part, build in sd14_networks(widths).items()},
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
        )
    export_pipeline(folder, pipeline)
    scheduler = folder / "scheduler" / "scheduler_config.json"  # the published one has this, which PNDM itself ignores
    write_json(scheduler, {**read_json(scheduler), "clip_sample": False})
    return folder


def _spelling_tokenizer(folder: Path) -> Any:
    """A tokenizer as large as CLIP's that spells: CLIP's own merges are not at hand, random weights need none."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    symbols = [*letters, *(letter + "</w>" for letter in letters)]
    unused = [f"<|unused{index}|>" for index in range(_VOCABULARY - 2 - len(symbols))]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {symbol: index for index, symbol in enumerate([*symbols, *unused, *_ENDS])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=_MAX_TOKENS, pad_token=_ENDS[1]
    )
    tokenizer.save_pretrained(folder)
    return tokenizer
