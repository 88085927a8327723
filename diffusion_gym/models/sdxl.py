"""Stable Diffusion XL: two text encoders, and a UNet that is also told the size of the picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffusion_gym.models.checkpoint import Checkpoint, token_limit
from diffusion_gym.models.latent import LatentModel, pack_pooled, unpack_pooled
from diffusion_gym.models.saving import export_adapters, export_pipeline
from diffusion_gym.quiet import quiet


class SDXLModel(LatentModel):
    """A `StableDiffusionXLPipeline` directory or hub id; arguments and errors as `LatentModel`.

    Prompts are the token ids of both tokenizers side by side. Their embedding is that of each token by both encoders,
    and in a last row the pooled one. The other added conditions are constant: the original and the target size are
    the picture's own, the crop begins at (0, 0).
    """

    PARTS: ClassVar[tuple[str, ...]] = (
        "unet",
        "vae",
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
        "scheduler",
    )

    def _load(self, checkpoint: Checkpoint) -> None:
        self.unet = checkpoint.network(UNet2DConditionModel, "unet")
        self.vae = checkpoint.network(AutoencoderKL, "vae")
        if self.dtype == torch.float16 and self.vae.config.force_upcast:
            self.vae.float()  # it overflows in float16; diffusers' pipeline upcasts it to decode
        self.text_encoder = checkpoint.network(CLIPTextModel, "text_encoder")
        self.text_encoder_2 = checkpoint.network(CLIPTextModelWithProjection, "text_encoder_2")
        self.tokenizer = checkpoint.tokenizer(CLIPTokenizer, "tokenizer")
        self.tokenizer_2 = checkpoint.tokenizer(CLIPTokenizer, "tokenizer_2")
        pairs = ((self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2))
        self.tokenizers = [(each, token_limit(each, encoder, self.name)) for each, encoder in pairs]
        config: Mapping[str, Any] = DDIMScheduler.load_config(checkpoint.folder, subfolder="scheduler")
        # SDXL is published with an Euler scheduler, which clamps nothing: DDIM's own default would clamp x0.
        self.scheduler_config = {"clip_sample": False, **config}
        self.zeros_for_empty_prompt = bool(checkpoint.index.get("force_zeros_for_empty_prompt", True))

    def _describe(self) -> None:
        super()._describe()
        size = self.image_shape[:2]
        self._time_ids = torch.tensor([[*size, 0, 0, *size]], device=self.device)
        self._empty = self.tokenize([""]).to(self.device)

    @torch.no_grad()
    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """The last but one hidden states of both encoders `(N, L, D)`, packed with the pooled output of the second.

        The empty prompt, which guidance pushes away from, is all zeros where the pipeline says
        `force_zeros_for_empty_prompt`.
        """
        first, second = self.token_ids(tokens)
        one = self.text_encoder(first, output_hidden_states=True)
        two = self.text_encoder_2(second, output_hidden_states=True)
        packed = pack_pooled(torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1), two.text_embeds)
        if not self.zeros_for_empty_prompt:
            return packed
        empty = (tokens.to(self.device) == self._empty).all(dim=1)
        return packed.masked_fill(empty[:, None, None], 0.0)

    def predict(
        self, unet: nn.Module, latents: torch.Tensor, timesteps: torch.Tensor, embeddings: torch.Tensor | None
    ) -> torch.Tensor:
        """Output `(N, C, H, W)` of `unet`, in the dtype of the weights; see `DenoisingModel.predict`."""
        assert embeddings is not None
        hidden, pooled = unpack_pooled(embeddings, self.text_encoder_2.config.projection_dim)
        times = self._time_ids.to(hidden.dtype).expand(len(latents), -1)
        return unet(
            latents.to(self.dtype),
            timesteps,
            encoder_hidden_states=hidden,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": times},
            return_dict=False,
        )[0]

    def save_pipeline(self, folder: str, unet: nn.Module) -> None:
        """Write a `StableDiffusionXLPipeline` directory with `unet` in it, in the dtype of its weights."""
        with quiet():
            from diffusers import StableDiffusionXLPipeline

            pipeline = StableDiffusionXLPipeline(
                vae=self.vae,
                text_encoder=self.text_encoder,
                text_encoder_2=self.text_encoder_2,
                tokenizer=self.tokenizer,
                tokenizer_2=self.tokenizer_2,
                unet=unet,
                scheduler=DDIMScheduler.from_config(self.scheduler_config),
                force_zeros_for_empty_prompt=self.zeros_for_empty_prompt,
                add_watermarker=False,
            )
        export_pipeline(folder, pipeline, self.tokenizer_files)

    def save_lora(self, folder: str | Path, unet: nn.Module) -> None:
        """Write the adapters of `unet` so that `StableDiffusionXLPipeline.load_lora_weights` reads them."""
        with quiet():
            from diffusers import StableDiffusionXLPipeline

        export_adapters(folder, StableDiffusionXLPipeline, "unet", unet)
