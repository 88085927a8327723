"""Pixel DDPM pipelines with random weights: a tiny one for tests, and the exact shape of google/ddpm-celebahq-256."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from diffusion_gym.models.quiet import quiet
from diffusion_gym.models.saving import export_pipeline
from diffusion_gym.storage import write_folder


def tiny_ddpm() -> Any:
    """A small `UNet2DModel` of 8x8 pictures, with attention."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=None,
        **_GOOGLES,
    )


def celebahq_ddpm() -> Any:
    """The network of `google/ddpm-celebahq-256`, 113,673,219 parameters; takes none under `torch.device("meta")`."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=256,
        block_out_channels=(128, 128, 256, 256, 512, 512),
        down_block_types=(*("DownBlock2D",) * 4, "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4),
        layers_per_block=2,
        attention_head_dim=None,
        **_GOOGLES,
    )


_GOOGLES: dict[str, Any] = {"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6}


def write_random_ddpm(
    folder: str | Path,
    seed: int = 0,
    *,
    size: Literal["tiny", "celebahq"] = "tiny",
    pipeline: Literal["DDPMPipeline", "DDIMPipeline"] = "DDPMPipeline",
    flat: bool = False,
    dtype: torch.dtype = torch.float32,
    **scheduler: Any,
) -> Path:
    """Write a pipeline of a random `UNet2DModel`, with the noise schedule of google's DDPMs.

    Args:
        folder: where to.
        seed: seed of the weights.
        size: `tiny` or `celebahq`.
        pipeline: the class that `model_index.json` names.
        flat: all files at the top, as in google's repositories, not in `unet/` and `scheduler/`.
        dtype: type of the weights.
        **scheduler: options of the scheduler, such as `clip_sample`, over those of google's.

    Returns:
        The folder.
    """
    folder = Path(folder)
    with quiet():
        import diffusers

        torch.manual_seed(seed)
        unet = (tiny_ddpm if size == "tiny" else celebahq_ddpm)().to(dtype)
        kind = diffusers.DDIMScheduler if pipeline == "DDIMPipeline" else diffusers.DDPMScheduler
        noise = kind(**{"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", **scheduler})
        whole = getattr(diffusers, pipeline)(unet=unet, scheduler=noise)

        def write_flat(place: Path) -> None:
            for part in (unet, noise):
                part.save_pretrained(place)
            whole.save_config(place)

        if flat:
            write_folder(folder, write_flat)
        else:
            export_pipeline(folder, whole)
    return folder
