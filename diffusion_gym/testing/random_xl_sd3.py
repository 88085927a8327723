"""Writes SDXL and Stable Diffusion 3 pipeline directories with random weights; downloads nothing.

Tiny ones for tests; or exact ones for measurements, whose networks that sample and decode have the published shapes of
`stabilityai/stable-diffusion-xl-base-1.0` and `stabilityai/stable-diffusion-3.5-medium` at 512x512 pictures. Their text
encoders have the published widths and one layer, and there is no T5: a prompt is encoded once and costs nothing after.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffusion_gym.models.quiet import quiet
from diffusion_gym.models.saving import export_pipeline
from diffusion_gym.testing.random_parts import JOINT_WIDTH, autoencoder, clip_config, t5_encoder, t5_tokenizer


def write_random_sdxl(
    folder: str | Path,
    seed: int = 0,
    *,
    force_zeros_for_empty_prompt: bool = True,
    exact: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a pipeline of Stable Diffusion XL's classes: 4x4 latents and 8x8 pictures, or the exact shape.

    Args:
        folder: where to.
        seed: seed of the weights.
        force_zeros_for_empty_prompt: whether zeros stand for the embedding of the empty prompt, as in the base model.
        exact: the published shapes, at 512x512 pictures, in place of tiny ones.
        dtype: type of the weights.

    Returns:
        The folder.
    """
    folder = Path(folder)
    widths = (768, 1280) if exact else (16, 24)
    with quiet():
        from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        tokenizer, tokenizer_2 = _tokenizers(folder)
        torch.manual_seed(seed)
        pipeline = StableDiffusionXLPipeline(
            vae=autoencoder(4, exact, scaling_factor=0.13025, force_upcast=True).to(dtype),
            text_encoder=CLIPTextModel(clip_config(tokenizer, widths[0])).to(dtype),
            text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizer_2, widths[1])).to(dtype),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=_unet(sum(widths), widths[1], exact).to(dtype),
            scheduler=EulerDiscreteScheduler.from_config(_SDXL_SCHEDULER),
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            add_watermarker=False,
        )
    export_pipeline(folder, pipeline)
    return folder


def write_random_sd3(
    folder: str | Path, seed: int = 0, *, t5: bool = True, exact: bool = False, dtype: torch.dtype = torch.float32
) -> Path:
    """Write a pipeline of Stable Diffusion 3's classes: 16x4x4 latents and 8x8 pictures, or 3.5 medium's exact shape.

    Args:
        folder: where to.
        seed: seed of the weights.
        t5: with the third text encoder, or without; an exact one is always without.
        exact: the published shapes, at 512x512 pictures, in place of tiny ones.
        dtype: type of the weights.

    Returns:
        The folder.
    """
    folder = Path(folder)
    t5, widths = t5 and not exact, (768, 1280) if exact else (16, 24)
    with quiet():
        from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
        from transformers import CLIPTextModelWithProjection

        tokenizer, tokenizer_2 = _tokenizers(folder)
        tokenizer_3 = t5_tokenizer(folder / "tokenizer_3") if t5 else None
        torch.manual_seed(seed)
        pipeline = StableDiffusion3Pipeline(
            transformer=_transformer(sum(widths), exact).to(dtype),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=autoencoder(16, exact, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False).to(dtype),
            text_encoder=CLIPTextModelWithProjection(clip_config(tokenizer, widths[0])).to(dtype),
            tokenizer=tokenizer,
            text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizer_2, widths[1])).to(dtype),
            tokenizer_2=tokenizer_2,
            text_encoder_3=t5_encoder(tokenizer_3).to(dtype) if t5 else None,
            tokenizer_3=tokenizer_3,
        )
    export_pipeline(folder, pipeline)
    return folder


# As the base model is published: with options of other schedulers, DDIM among them.
_SDXL_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def _tokenizers(folder: Path) -> tuple[Any, Any]:
    from diffusion_gym.testing.tokenizer import write_tokenizer

    return write_tokenizer(folder / "tokenizer"), write_tokenizer(folder / "tokenizer_2")


def _unet(cross_attention_dim: int, pooled_width: int, exact: bool) -> Any:
    from diffusers import UNet2DConditionModel

    sizes: dict[str, Any] = {
        "sample_size": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 2),
        "attention_head_dim": (2, 4),
        "norm_num_groups": 4,
        "addition_time_embed_dim": 8,
    }
    if exact:
        sizes = {
            "sample_size": 64,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (320, 640, 1280),
            "layers_per_block": 2,
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "addition_time_embed_dim": 256,
        }
    return UNet2DConditionModel(
        **sizes,
        use_linear_projection=True,
        cross_attention_dim=cross_attention_dim,
        addition_embed_type="text_time",
        projection_class_embeddings_input_dim=pooled_width + 6 * sizes["addition_time_embed_dim"],
    )


def _transformer(pooled_width: int, exact: bool) -> Any:
    from diffusers import SD3Transformer2DModel

    sizes: dict[str, Any] = {
        "sample_size": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "caption_projection_dim": 16,
        "joint_attention_dim": JOINT_WIDTH,
        "pos_embed_max_size": 4,
        "dual_attention_layers": (0,),
    }
    if exact:
        sizes = {
            "sample_size": 64,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "joint_attention_dim": 4096,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
        }
    return SD3Transformer2DModel(
        **sizes, patch_size=2, in_channels=16, out_channels=16, pooled_projection_dim=pooled_width, qk_norm="rms_norm"
    )
