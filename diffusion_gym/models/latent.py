"""Latent text-to-image models: Stable Diffusion 1.x and 2.x, and what SDXL and Stable Diffusion 3 share with them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from torch.nn.functional import pad
from transformers import CLIPTextModel, CLIPTokenizer

from diffusion_gym.config import SamplerConfig
from diffusion_gym.hub import located
from diffusion_gym.images import to_unit
from diffusion_gym.models.checkpoint import Checkpoint, sides, token_limit
from diffusion_gym.models.fields import INDEX, TEXT_ENCODER, UNET, VAE, Allowed, check_index, check_parts
from diffusion_gym.models.quiet import quiet
from diffusion_gym.models.saving import export_pipeline
from diffusion_gym.models.schedulers import ddim_scheduler, read_scheduler, stated, step_table
from diffusion_gym.pretrained import fingerprint
from diffusion_gym.scheduling import StepTable

_PIXELS_A_DECODE = 2**22  # 16 pictures of 512x512: bounds the memory of the VAE


def guidance_embedding(scale: float, width: int) -> torch.Tensor:
    """What a network that takes the guidance scale itself is told of it, `(1, width)`: sines and cosines of w - 1.

    That of diffusers' pipelines, for networks distilled as in arXiv:2210.03142 and arXiv:2310.04378.

    Args:
        scale: w.
        width: the network's `time_cond_proj_dim`.
    """
    half = width // 2
    rates = torch.exp(torch.arange(half) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = (torch.tensor(scale - 1.0) * 1000.0)[None, None] * rates
    return pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))


def pack_pooled(hidden: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    """Text embeddings as one tensor, which the policy caches and stacks: `pooled` as further rows of `hidden`.

    Args:
        hidden: of each token, `(N, L, D)`.
        pooled: of the prompt, `(N, P)`.

    Returns:
        `(N, L + ceil(P / D), D)`; zeros fill the last row.
    """
    number, _, width = hidden.shape
    rows = -(-pooled.shape[1] // width)
    return torch.cat([hidden, pad(pooled, (0, rows * width - pooled.shape[1])).view(number, rows, width)], dim=1)


def unpack_pooled(packed: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`hidden` `(N, L, D)` and `pooled` `(N, width)` of what `pack_pooled` made."""
    rows = -(-width // packed.shape[2])
    return packed[:, :-rows], packed[:, -rows:].flatten(1)[:, :width]


class LatentModel:
    """A Stable Diffusion directory or hub id; see `DenoisingModel` for the attributes.

    Args:
        source: a diffusers pipeline directory, or a hub id.
        device: where the weights go.
        dtype: type of the weights.
        name: what to call it; `source` by default.
        sampler_defaults: the model's own defaults for `SamplerConfig`.
        default_prompts: name of its default prompt set.
        revision: branch, tag or commit of a hub id.
        variant: such as `fp16`, the weight files to take where there are several.

    Raises:
        FileNotFoundError: `source` is neither a pipeline directory nor at hand from the hub.
        ValueError: a config asks for what changes the samples and is not followed here; a part is of another class, its
            files do not hold its weights, or the parts do not fit each other.
    """

    PARTS: ClassVar[tuple[str, ...]] = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    FIELDS: ClassVar[Mapping[str, Allowed]] = {"unet": UNET, "vae": VAE, "text_encoder": TEXT_ENCODER}
    INDEX: ClassVar[Allowed] = INDEX
    SAMPLER_DEFAULTS: ClassVar[Mapping[str, Any]] = {}

    unet: nn.Module
    vae: Any
    scheduler_config: Mapping[str, Any]
    tokenizers: list[tuple[Any, int]]  # each with the number of its token ids in a row

    def __init__(
        self,
        source: str | Path,
        *,
        device: torch.device,
        dtype: torch.dtype,
        name: str | None = None,
        sampler_defaults: Mapping[str, Any] | None = None,
        default_prompts: str = "imagenet-animals",
        revision: str | None = None,
        variant: str | None = None,
    ) -> None:
        folder = located(str(source), self._parts(str(source), revision), revision=revision, variant=variant)
        self.files = folder, fingerprint(folder)
        self.name = name or str(source)
        self.device, self.dtype = device, dtype
        self.sampler_defaults: Mapping[str, Any] = {**self.SAMPLER_DEFAULTS, **(sampler_defaults or {})}
        self.default_prompts = default_prompts
        with quiet():
            checkpoint = Checkpoint(folder, device, dtype, variant, self.name)
            check_index(self.name, checkpoint.index, self.INDEX)
            check_parts(self.name, folder, self.FIELDS)
            scheduler = self._scheduler(read_scheduler(self.name, folder, "scheduler", checkpoint.index))
            self._load(checkpoint)
            self.tokenizer_files = checkpoint.tokenizer_files()
            # The constructor corrects outdated configs, of the scheduler and of the network, in place.
            self.scheduler_config = stated(self._pipeline(self.unet, scheduler).scheduler)
        self._describe()

    def _parts(self, source: str, revision: str | None) -> Sequence[str]:
        """The sub-folders that the pipeline needs."""
        return self.PARTS

    def _scheduler(self, config: Mapping[str, Any]) -> Any:
        """The scheduler of our sampler, in the place of the folder's own."""
        return ddim_scheduler(self.name, config)

    def _load(self, checkpoint: Checkpoint) -> None:
        self.unet = checkpoint.network(UNet2DConditionModel, "unet")
        self.vae = checkpoint.network(AutoencoderKL, "vae")
        self.text_encoder = checkpoint.network(CLIPTextModel, "text_encoder")
        self.tokenizer = checkpoint.tokenizer(CLIPTokenizer, "tokenizer")
        self.tokenizers = [(self.tokenizer, token_limit(self.tokenizer, self.text_encoder, self.name))]

    def _describe(self) -> None:
        unet: Any = self.unet.config
        vae, (height, width) = self.vae.config, sides(unet.sample_size, self.name)
        if not unet.in_channels == unet.out_channels == vae.latent_channels:
            raise ValueError(
                f"model={self.name!r}: its network has {unet.in_channels} channels in and {unet.out_channels} out, its "
                f"autoencoder {vae.latent_channels}; use a text-to-image model, where they are equal"
            )
        self.latent_shape: tuple[int, int, int] = (unet.in_channels, height, width)
        scale = 2 ** (len(vae.block_out_channels) - 1)
        self.image_shape: tuple[int, int, int] = (height * scale, width * scale, 3)
        self.prompt_length = sum(length for _, length in self.tokenizers)
        self.vocab_size = max(len(tokenizer) for tokenizer, _ in self.tokenizers)
        self.num_train_timesteps = self.scheduler_config["num_train_timesteps"]
        self._guidance_width: int | None = unet.get("time_cond_proj_dim")
        self.embeds_guidance = self._guidance_width is not None

    def step_table(self, config: SamplerConfig) -> StepTable:
        """Coefficients of the T steps of `config`, float64 on the CPU; see `step_table`."""
        return step_table(self.scheduler_config, config)

    def tokenize(self, prompts: Sequence[str]) -> torch.Tensor:
        """Token ids: int64 `(N, L)` on the CPU, padded and cut; those of several tokenizers side by side."""
        parts = [
            tokenizer(
                list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            ).input_ids
            for tokenizer, length in self.tokenizers
        ]
        return torch.cat(parts, dim=1)

    def token_ids(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The token ids of each tokenizer, on the model's device, from rows of `tokenize`."""
        return tokens.to(self.device).split([length for _, length in self.tokenizers], dim=1)

    @torch.no_grad()
    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Last hidden states of the text encoder for tokens `(N, L)`: `(N, L, D)`."""
        return self.text_encoder(tokens.to(self.device))[0]

    @torch.no_grad()
    def embed_null(self) -> torch.Tensor:
        """Embedding `(1, L, D)` that guidance pushes away from: that of the empty prompt."""
        return self.embed(self.tokenize([""]))

    def guidance_condition(self, guidance_scale: float, number: int) -> torch.Tensor | None:
        """What the network is told of the guidance scale, `(number, width)`; None where it is not told."""
        if self._guidance_width is None:
            return None
        embedding = guidance_embedding(guidance_scale, self._guidance_width)
        return embedding.to(self.device, self.dtype).expand(number, -1)

    def predict(
        self,
        unet: nn.Module,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        embeddings: torch.Tensor | None,
        *,
        guidance_scale: float = 1.0,
    ) -> torch.Tensor:
        """Output `(N, C, H, W)` of `unet`, in the dtype of the weights; see `DenoisingModel.predict`."""
        return unet(
            latents.to(self.dtype),
            timesteps,
            encoder_hidden_states=embeddings,
            timestep_cond=self.guidance_condition(guidance_scale, len(latents)),
            return_dict=False,
        )[0]

    def _unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the autoencoder made them, as the family's pipeline in diffusers scales them back."""
        return latents / self.vae.config.scaling_factor

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures of latents `(N, C, H, W)`: float32 `(N, 3, H, W)` in [0, 1], with their gradient."""
        scaled = self._unscaled(latents.to(self.device, self.vae.dtype))
        count = max(1, _PIXELS_A_DECODE // (self.image_shape[0] * self.image_shape[1]))
        parts = [self.vae.decode(part, return_dict=False)[0].float() for part in scaled.split(count)]
        return to_unit(torch.cat(parts))

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Latents of pictures `(N, 3, H, W)` in [0, 1], float32 `(N, C, H, W)`: the mean that the autoencoder gives."""
        pixels = images.to(self.device, self.vae.dtype) * 2 - 1
        count = max(1, _PIXELS_A_DECODE // (self.image_shape[0] * self.image_shape[1]))
        raw = torch.cat([self.vae.encode(part).latent_dist.mean.float() for part in pixels.split(count)])
        shift = self._unscaled(torch.zeros_like(raw[:1]))  # the scaling of each family is affine
        return (raw - shift) / (self._unscaled(torch.ones_like(raw[:1])) - shift)

    def _pipeline(self, unet: nn.Module, scheduler: Any) -> Any:
        """Diffusers' pipeline of the model's parts with `unet`."""
        from diffusers import StableDiffusionPipeline

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # that a config is outdated, and is corrected
            return StableDiffusionPipeline(
                vae=self.vae,
                text_encoder=self.text_encoder,
                tokenizer=self.tokenizer,
                unet=unet,
                scheduler=scheduler,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )

    def save_pipeline(self, folder: str, unet: nn.Module) -> None:
        """Write a directory of the model's pipeline class with `unet` in it, in the dtype of its weights.

        Its scheduler is that of the model's step tables.
        """
        with quiet():
            pipeline = self._pipeline(unet, self._scheduler(self.scheduler_config))
        export_pipeline(folder, pipeline, self.tokenizer_files)

    def save_lora(self, folder: str | Path, unet: nn.Module) -> None:
        """Write the adapters of `unet` so that `load_lora_weights` of the model's diffusers pipeline reads them."""
        from diffusion_gym.models.lora import save_lora

        save_lora(folder, unet)
