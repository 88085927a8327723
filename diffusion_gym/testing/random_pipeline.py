"""Writes pipeline directories with random weights, for tests and benchmarks; downloads nothing.

Run `python -m diffusion_gym.testing.random_pipeline --help`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

Size = Literal["tiny", "small", "sd14", "tiny-ddpm", "celebahq", "tiny-sdxl", "sdxl", "tiny-sd3", "sd35-medium"]


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
    from diffusion_gym.models.saving import export_pipeline

    folder = Path(folder)
    with quiet():
        from diffusers import DDIMScheduler, StableDiffusionPipeline

        from diffusion_gym.testing.tokenizer import write_tokenizer

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
        pipeline = StableDiffusionPipeline(
            vae=_autoencoder(),
            text_encoder=_text_encoder(tokenizer),
            tokenizer=tokenizer,
            unet=_unet(),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        export_pipeline(folder, pipeline)
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
        mid_block_type="UNetMidBlock2D",  # one block with attention is enough to see the text, and half the seconds
        up_block_types=("UpBlock2D", "UpBlock2D"),
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


def write_pipeline(folder: Path, size: Size, seed: int, dtype: torch.dtype) -> Path:
    """Write the random pipeline of a size; see `RandomPipelineOptions`.

    Raises:
        FileExistsError: something else is at `folder`.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"out={str(folder)!r} is not empty; choose another folder")
    if size in ("small", "sd14"):
        from diffusion_gym.testing.random_sd14 import SD14, SMALL, write_random_sd14

        return write_random_sd14(folder, seed, dtype=dtype, widths=SMALL if size == "small" else SD14)
    if size in ("tiny-ddpm", "celebahq"):
        from diffusion_gym.testing.random_ddpm import write_random_ddpm

        return write_random_ddpm(folder, seed, size="tiny" if size == "tiny-ddpm" else "celebahq", dtype=dtype)
    if size != "tiny":
        from diffusion_gym.testing.random_xl_sd3 import write_random_sd3, write_random_sdxl

        write = write_random_sdxl if size in ("sdxl", "tiny-sdxl") else write_random_sd3
        return write(folder, seed, exact=not size.startswith("tiny"), dtype=dtype)
    write_random_pipeline(folder, seed=seed)
    if dtype != torch.float32:
        _convert(folder, dtype)
    return folder


def _convert(folder: Path, dtype: torch.dtype) -> None:
    """Give the weights of a written pipeline another type."""
    from diffusion_gym.storage import load_tensors, save_tensors, tensors_metadata

    for path in folder.rglob("*.safetensors"):
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in load_tensors(path).items()}
        save_tensors(path, tensors, tensors_metadata(path))


@dataclass(frozen=True)
class RandomPipelineOptions:
    """Write a pipeline directory with random weights."""

    out: Annotated[Path, tyro.conf.Positional]
    """Where to: a folder that is new or empty."""
    size: Size = "tiny"
    """`sd14` and `celebahq` are the exact shapes of CompVis/stable-diffusion-v1-4 (4.3 GB in float32) and
    google/ddpm-celebahq-256 (0.5 GB); `sdxl` and `sd35-medium` those of the networks that sample and decode of SDXL and
    Stable Diffusion 3.5 medium at 512x512 pictures, with text encoders of one layer; `small` is a narrow `sd14` for
    measurements on a CPU (16x16 latents, 64x64 pictures); the others are tiny ones of the same classes."""
    seed: int = 0
    """Seed of the weights."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Write what the command line asks for, and say where it is; a mistake ends in one line and exit code 2."""
    options = tyro.cli(RandomPipelineOptions, args=arguments, prog="python -m diffusion_gym.testing.random_pipeline")
    try:
        print(write_pipeline(options.out, options.size, options.seed, getattr(torch, options.dtype)))
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
