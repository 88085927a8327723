"""Writes a tiny FLUX.1 pipeline directory with random weights; downloads nothing."""

from __future__ import annotations

from pathlib import Path

import torch

from diffusion_gym.models.quiet import quiet
from diffusion_gym.models.saving import export_pipeline
from diffusion_gym.testing.random_parts import JOINT_WIDTH, autoencoder, clip_config, t5_encoder, t5_tokenizer
from diffusion_gym.testing.tokenizer import write_tokenizer


def write_random_flux(folder: str | Path, seed: int = 0, *, guidance_embeds: bool = True) -> Path:
    """Write a pipeline of FLUX.1's classes: 16 channels of latents, pictures of any multiple of 4 pixels.

    Args:
        folder: where to.
        seed: seed of the weights.
        guidance_embeds: whether the network is told the guidance scale, as that of dev is; that of schnell is not.

    Returns:
        The folder.
    """
    folder = Path(folder)
    with quiet():
        from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
        from transformers import CLIPTextModel

        tokenizer, tokenizer_2 = write_tokenizer(folder / "tokenizer"), t5_tokenizer(folder / "tokenizer_2")
        torch.manual_seed(seed)
        pipeline = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=guidance_embeds),
            vae=autoencoder(16, False, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False),
            text_encoder=CLIPTextModel(clip_config(tokenizer, 16)),
            tokenizer=tokenizer,
            text_encoder_2=t5_encoder(tokenizer_2),
            tokenizer_2=tokenizer_2,
            transformer=FluxTransformer2DModel(
                in_channels=64,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=JOINT_WIDTH,
                pooled_projection_dim=16,
                guidance_embeds=guidance_embeds,
                axes_dims_rope=(4, 6, 6),
            ),
        )
    export_pipeline(folder, pipeline)
    return folder
