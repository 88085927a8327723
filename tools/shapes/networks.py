"""The four networks of the `Shapes` model: diffusers and transformers classes, in Stable Diffusion's roles."""

from __future__ import annotations

from typing import Final

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from diffusion_gym.shapes.scenes import SIZE

TEXT_WIDTH: Final = 96
MAX_TOKENS: Final = 16
LATENT_CHANNELS: Final = 4


def make_autoencoder() -> AutoencoderKL:
    """Autoencoder of factor 4: (3, 32, 32) <-> latents (4, 8, 8)."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=1.0,  # latents are whitened inside quant_conv
        mid_block_add_attention=False,
    )


def make_text_encoder(vocab_size: int, eos: int, bos: int) -> CLIPTextModel:
    """Two-layer CLIP text transformer over `MAX_TOKENS` tokens."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=bos,
            eos_token_id=eos,
            pad_token_id=eos,
        )
    )


def make_unet() -> UNet2DConditionModel:
    """UNet over (4, 8, 8) latents with cross-attention to the text at both of its levels."""
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 96),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # diffusers' name for the number of heads here
        norm_num_groups=16,
    )


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion's schedule: scaled-linear betas, epsilon prediction, 1000 training steps."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
