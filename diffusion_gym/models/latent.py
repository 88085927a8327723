"""Latent text-to-image models in Stable Diffusion's layout: CLIP text encoder, UNet with cross-attention, VAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from diffusion_gym.config import SamplerConfig
from diffusion_gym.models.hub import located
from diffusion_gym.models.quiet import quiet
from diffusion_gym.scheduling import NoiseSchedule, StepTable, ddim_table, ddpm_table

_PIXELS_A_DECODE = 2**22  # 16 pictures of 512x512: bounds the memory of the VAE


def step_table(scheduler_config: Mapping[str, Any], config: SamplerConfig) -> StepTable:
    """Step table of a diffusers scheduler config, float64.

    Args:
        scheduler_config: `scheduler_config.json` of any diffusers scheduler with betas.
        config: the sampler.

    Raises:
        ValueError: T is larger than the schedule, or the scheduler uses dynamic thresholding.
    """
    kind = DDPMScheduler if config.sampler == "ddpm" else DDIMScheduler
    scheduler = kind.from_config(scheduler_config)
    total, steps = scheduler.config.num_train_timesteps, config.num_inference_steps
    most = total - scheduler.config.steps_offset if scheduler.config.timestep_spacing == "leading" else total
    if steps > most:
        raise ValueError(f"num_inference_steps={steps} is larger than the model's schedule; use at most {most}")
    if scheduler.config.thresholding:
        raise ValueError("the model's scheduler has thresholding=True, which has no Gaussian step; switch it off")
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.to(torch.int64).cpu()[:steps]  # `trailing` can round to one more
    schedule = NoiseSchedule(
        alpha_bar=scheduler.alphas_cumprod.double(),
        final_alpha_bar=float(getattr(scheduler, "final_alpha_cumprod", 1.0)),
        prediction=scheduler.config.prediction_type,
        clip_x0=scheduler.config.clip_sample_range if scheduler.config.clip_sample else None,
        variance="fixed_large" if scheduler.config.get("variance_type") == "fixed_large" else "fixed_small",
    )
    if config.sampler == "ddpm":
        previous = torch.cat([timesteps[1:], torch.tensor([-1])])
        return ddpm_table(schedule, timesteps, previous, sigma_min=config.sigma_min)
    return ddim_table(schedule, timesteps, timesteps - total // steps, eta=config.eta, sigma_min=config.sigma_min)


class LatentModel:
    """A Stable Diffusion directory or hub id; see `DenoisingModel` for the attributes.

    Args:
        source: a diffusers pipeline directory, or a hub id.
        device: where the weights go.
        dtype: type of the weights.
        name: what to call it; `source` by default.
        sampler_defaults: the model's own defaults for `SamplerConfig`.
        default_prompts: name of its default prompt set.

    Raises:
        FileNotFoundError: `source` is neither a pipeline directory nor at hand from the hub.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        device: torch.device,
        dtype: torch.dtype,
        name: str | None = None,
        sampler_defaults: Mapping[str, Any] | None = None,
        default_prompts: str = "common-animals",
    ) -> None:
        folder = located(str(source), ("unet", "vae", "text_encoder", "tokenizer", "scheduler"))
        self.name = name or str(source)
        self.device, self.dtype = device, dtype
        self.sampler_defaults: Mapping[str, Any] = dict(sampler_defaults or {})
        self.default_prompts = default_prompts
        with quiet():
            self._load(folder)
        self._describe()

    def _load(self, folder: str) -> None:
        place: dict[str, Any] = {"torch_dtype": self.dtype}
        self.unet: nn.Module = self._frozen(UNet2DConditionModel.from_pretrained(folder, subfolder="unet", **place))
        self.vae = self._frozen(AutoencoderKL.from_pretrained(folder, subfolder="vae", **place))
        self.text_encoder = self._frozen(
            CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=self.dtype)
        )
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
        self.scheduler_config = DDIMScheduler.load_config(folder, subfolder="scheduler")

    def _frozen(self, network: nn.Module) -> Any:
        return network.to(self.device).requires_grad_(False).eval()

    def _describe(self) -> None:
        unet: Any = self.unet.config
        vae, side = self.vae.config, int(unet.sample_size)
        self.latent_shape: tuple[int, int, int] = (unet.in_channels, side, side)
        pixels = side * 2 ** (len(vae.block_out_channels) - 1)
        self.image_shape: tuple[int, int, int] = (pixels, pixels, 3)
        self.prompt_length = self.tokenizer.model_max_length
        self.vocab_size = len(self.tokenizer)
        self.num_train_timesteps = self.scheduler_config["num_train_timesteps"]

    def step_table(self, config: SamplerConfig) -> StepTable:
        """Coefficients of the T steps of `config`, float64 on the CPU; see `step_table`."""
        return step_table(self.scheduler_config, config)

    def tokenize(self, prompts: Sequence[str]) -> torch.Tensor:
        """Token ids: int64 `(N, L)` on the CPU, padded and cut to L."""
        batch = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.prompt_length, truncation=True, return_tensors="pt"
        )
        return batch.input_ids

    @torch.no_grad()
    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Last hidden states of the text encoder for tokens `(N, L)`: `(N, L, D)`."""
        return self.text_encoder(tokens.to(self.device))[0]

    def predict(
        self, unet: nn.Module, latents: torch.Tensor, timesteps: torch.Tensor, embeddings: torch.Tensor | None
    ) -> torch.Tensor:
        """Output `(N, C, H, W)` of `unet`, in the dtype of the weights; see `DenoisingModel.predict`."""
        return unet(latents.to(self.dtype), timesteps, encoder_hidden_states=embeddings, return_dict=False)[0]

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures of latents `(N, C, H, W)`: float32 `(N, 3, H, W)` in [0, 1]."""
        scaled = latents.to(self.device, self.dtype) / self.vae.config.scaling_factor
        count = max(1, _PIXELS_A_DECODE // (self.image_shape[0] * self.image_shape[1]))
        parts = [self.vae.decode(part, return_dict=False)[0].float() for part in scaled.split(count)]
        return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)

    def save_pipeline(self, folder: str, unet: nn.Module) -> None:
        """Write a `StableDiffusionPipeline` directory with `unet` in it, in the dtype of its weights."""
        with quiet():
            from diffusers import StableDiffusionPipeline

            StableDiffusionPipeline(
                vae=self.vae,
                text_encoder=self.text_encoder,
                tokenizer=self.tokenizer,
                unet=unet,
                scheduler=DDIMScheduler.from_config(self.scheduler_config),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            ).save_pretrained(folder)
