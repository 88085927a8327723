"""Writes a tiny Sana pipeline directory with random weights; downloads nothing."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch

from diffusion_gym.models.quiet import quiet
from diffusion_gym.models.saving import export_pipeline


def write_random_sana(folder: str | Path, seed: int = 0) -> Path:
    """Write a pipeline of Sana's classes: 4 channels of latents, pictures of any multiple of 4 pixels.

    Args:
        folder: where to.
        seed: seed of the weights.

    Returns:
        The folder.
    """
    folder = Path(folder)
    with quiet():
        from diffusers import DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
        from transformers import Gemma2Config, Gemma2Model

        tokenizer = _tokenizer(folder / "tokenizer")
        torch.manual_seed(seed)
        pipeline = SanaPipeline(
            tokenizer=tokenizer,
            text_encoder=Gemma2Model(
                Gemma2Config(
                    vocab_size=len(tokenizer),
                    hidden_size=16,
                    intermediate_size=16,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                    head_dim=8,
                    query_pre_attn_scalar=8,
                    max_position_embeddings=2048,
                )
            ),
            vae=_autoencoder(),
            transformer=SanaTransformer2DModel(
                sample_size=2,
                in_channels=4,
                out_channels=4,
                num_layers=1,
                num_attention_heads=2,
                attention_head_dim=8,
                num_cross_attention_heads=2,
                cross_attention_head_dim=8,
                cross_attention_dim=16,
                caption_channels=16,
            ),
            scheduler=DPMSolverMultistepScheduler(
                use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
            ),
        )
    export_pipeline(folder, pipeline)
    return folder


def _autoencoder() -> Any:
    from diffusers import AutoencoderDC

    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock",) * 3,
        decoder_block_types=("ResBlock",) * 3,
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )


def _tokenizer(folder: Path) -> Any:
    """Gemma's class with letters for tokens."""
    from transformers import GemmaTokenizerFast

    marks = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    vocabulary = [*marks, "▁", *(character for character in string.printable if not character.isspace())]
    tokenizer = GemmaTokenizerFast(vocab={token: index for index, token in enumerate(vocabulary)}, merges=[])
    tokenizer.save_pretrained(folder)
    return tokenizer
