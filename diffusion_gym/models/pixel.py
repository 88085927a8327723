"""Unconditional pixel DDPMs (arXiv:2006.11239): the latents are the pixels themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from diffusion_gym.config import SamplerConfig
from diffusion_gym.hub import located
from diffusion_gym.images import to_unit
from diffusion_gym.models.base import FAMILIES
from diffusion_gym.models.checkpoint import Checkpoint, sides
from diffusion_gym.models.fields import PLAIN_INDEX, check_index
from diffusion_gym.models.quiet import quiet
from diffusion_gym.models.saving import export_pipeline
from diffusion_gym.models.schedulers import ddim_scheduler, read_scheduler, stated, step_table
from diffusion_gym.pretrained import fingerprint
from diffusion_gym.scheduling import StepTable

_PARTS = ("unet", "scheduler")


@FAMILIES.register("DDPMPipeline")
@FAMILIES.register("DDIMPipeline")
class PixelModel:
    """A `DDPMPipeline` or `DDIMPipeline` directory or hub id; see `DenoisingModel` for the attributes.

    Its files lie in `unet/` and `scheduler/`, or all at the top as in `google/ddpm-celebahq-256`.

    Args:
        source: a diffusers pipeline directory, or a hub id.
        device: where the weights go.
        dtype: type of the weights.
        name: what to call it; `source` by default.
        sampler_defaults: the model's own defaults for `SamplerConfig`, over those of the thesis, section 5.1.
        default_prompts: name of its default prompt set.
        revision: branch, tag or commit of a hub id.
        variant: such as `fp16`, the weight files to take where there are several.

    Raises:
        FileNotFoundError: `source` is neither a pipeline directory nor at hand from the hub.
        ValueError: the network is conditional, or predicts its variance too; or its files do not hold its weights.
    """

    # DDIM with 40 steps is the thesis's. It gives no eta, and its policy gradient needs noise. No prompt, no guidance.
    SAMPLER_DEFAULTS: ClassVar[Mapping[str, Any]] = {"num_inference_steps": 40, "eta": 1.0, "guidance_scale": 1.0}

    prompt_length = 0
    vocab_size = 0

    def __init__(
        self,
        source: str | Path,
        *,
        device: torch.device,
        dtype: torch.dtype,
        name: str | None = None,
        sampler_defaults: Mapping[str, Any] | None = None,
        default_prompts: str = "unconditional",
        revision: str | None = None,
        variant: str | None = None,
    ) -> None:
        folder = located(str(source), optional=_PARTS, revision=revision, variant=variant)
        self.files = folder, fingerprint(folder)
        unet_part, scheduler_part = (part if Path(folder, part).is_dir() else "" for part in _PARTS)
        self.name = name or str(source)
        self.device, self.dtype = device, dtype
        self.sampler_defaults: Mapping[str, Any] = {**self.SAMPLER_DEFAULTS, **(sampler_defaults or {})}
        self.default_prompts = default_prompts
        with quiet():
            checkpoint = Checkpoint(folder, device, dtype, variant, self.name)
            self.scheduler_config = self._scheduler(checkpoint, scheduler_part)
            self.unet: nn.Module = checkpoint.part("UNet2DModel", unet_part)
        self._describe()

    def _scheduler(self, checkpoint: Checkpoint, part: str) -> dict[str, Any]:
        """The scheduler's config after what diffusers' `DDIMPipeline` makes of it: a `DDIMScheduler`, which clamps."""
        check_index(self.name, checkpoint.index, PLAIN_INDEX)
        config = read_scheduler(self.name, checkpoint.folder, part, checkpoint.index)
        converts = checkpoint.index["_class_name"] == "DDIMPipeline"
        ours = stated(ddim_scheduler(self.name, config, clamps=converts))
        is_ddim = converts or config["_class_name"] == "DDIMScheduler"
        return {**ours, "_class_name": "DDIMScheduler" if is_ddim else "DDPMScheduler"}

    def _describe(self) -> None:
        unet: Any = self.unet.config
        if unet.class_embed_type is not None or unet.num_class_embeds is not None:
            raise ValueError(f"model={self.name!r} is conditioned on classes; use an unconditional UNet2DModel")
        if unet.in_channels != 3 or unet.out_channels != 3:
            raise ValueError(
                f"model={self.name!r} has {unet.in_channels} channels in and {unet.out_channels} out; use a model of "
                "RGB pixels with a fixed variance, 3 in and 3 out"
            )
        height, width = sides(unet.sample_size, self.name)
        self.latent_shape: tuple[int, int, int] = (3, height, width)
        self.image_shape: tuple[int, int, int] = (height, width, 3)
        self.num_train_timesteps: int = int(self.scheduler_config.get("num_train_timesteps", 1000))  # as diffusers

    def step_table(self, config: SamplerConfig) -> StepTable:
        """Coefficients of the T steps of `config`, float64 on the CPU; see `step_table` of the latent models."""
        return step_table(self.scheduler_config, config)

    def tokenize(self, prompts: Sequence[str]) -> torch.Tensor:
        """No tokens: int64 `(N, 0)`."""
        return torch.zeros(len(prompts), 0, dtype=torch.int64)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """No embeddings: `(N, 0, 0)`."""
        return torch.zeros(len(tokens), 0, 0, device=self.device)

    def predict(
        self, unet: nn.Module, latents: torch.Tensor, timesteps: torch.Tensor, embeddings: torch.Tensor | None
    ) -> torch.Tensor:
        """Output `(N, 3, H, W)` of `unet`, in the dtype of the weights; `embeddings` mean nothing here."""
        return unet(latents.to(self.dtype), timesteps, return_dict=False)[0]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures of pixels `(N, 3, H, W)` in [-1, 1]: float32 `(N, 3, H, W)` in [0, 1]."""
        return to_unit(latents)

    def save_pipeline(self, folder: str, unet: nn.Module) -> None:
        """Write a pipeline directory with `unet` in it, in the dtype of its weights.

        It is a `DDIMPipeline` where the scheduler is a `DDIMScheduler`, else a `DDPMPipeline`.
        """
        with quiet():
            from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler

            ddim = self.scheduler_config.get("_class_name") == "DDIMScheduler"
            pipeline, scheduler = (DDIMPipeline, DDIMScheduler) if ddim else (DDPMPipeline, DDPMScheduler)
            whole = pipeline(unet=unet, scheduler=scheduler.from_config(self.scheduler_config))
        export_pipeline(folder, whole)
