"""Writes a Stable Diffusion pipeline directory with random weights, for tests and benchmarks; downloads nothing.

Run `python -m diffusion_gym.models.random_pipeline OUT`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch


def write_random_pipeline(
    folder: str | Path,
    *,
    seed: int = 0,
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon",
    clip_sample: bool = False,
    set_alpha_to_one: bool = False,
) -> Path:
    """Write a tiny pipeline of the same classes as Stable Diffusion 1.x: 4x4 latents, 8x8 pictures.

    Args:
        folder: where to.
        seed: seed of the weights.
        prediction_type: the scheduler's.
        clip_sample: the scheduler's.
        set_alpha_to_one: the scheduler's.

    Returns:
        The folder.
    """
    from diffusion_gym.models.quiet import quiet

    folder = Path(folder)
    with quiet():
        from diffusers import DDIMScheduler, StableDiffusionPipeline

        from diffusion_gym.models.shapes.vocabulary import write_tokenizer

        tokenizer = write_tokenizer(folder / "tokenizer")
        torch.manual_seed(seed)
        scheduler = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=prediction_type,
            clip_sample=clip_sample,
            set_alpha_to_one=set_alpha_to_one,
            steps_offset=1,
        )
        StableDiffusionPipeline(
            vae=_autoencoder(),
            text_encoder=_text_encoder(tokenizer),
            tokenizer=tokenizer,
            unet=_unet(),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)
        # The pipeline's constructor has switched clip_sample off.
        DDIMScheduler.from_config({**scheduler.config, "clip_sample": clip_sample}).save_pretrained(
            folder / "scheduler"
        )
    return folder


def _text_encoder(tokenizer: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            projection_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _unet() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def _autoencoder() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=8,
        mid_block_add_attention=False,
    )


if __name__ == "__main__":
    import tyro

    tyro.cli(write_random_pipeline)
