"""Stable Diffusion XL: two text encoders, and a UNet that is also told the size of the picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffusion_gym.models.checkpoint import Checkpoint, token_limit
from diffusion_gym.models.fields import XL_INDEX, XL_UNET, XL_VAE, Allowed
from diffusion_gym.models.latent import LatentModel, pack_pooled, unpack_pooled
from diffusion_gym.models.quiet import quiet
from diffusion_gym.models.saving import export_adapters


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
    FIELDS: ClassVar[Mapping[str, Allowed]] = {"unet": XL_UNET, "vae": XL_VAE}
    INDEX: ClassVar[Allowed] = XL_INDEX

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
        self.zeros_for_empty_prompt = bool(checkpoint.index.get("force_zeros_for_empty_prompt", True))

    def _describe(self) -> None:
        super()._describe()
        size = self.image_shape[:2]
        self._time_ids = torch.tensor([[*size, 0, 0, *size]], device=self.device)
        self._check_condition()

    def _check_condition(self) -> None:
        unet: Any = self.unet.config
        pooled, width = self.text_encoder_2.config.projection_dim, unet.projection_class_embeddings_input_dim
        if unet.addition_embed_type == "text_time" and pooled + 6 * unet.addition_time_embed_dim != width:
            raise ValueError(
                f"model={self.name!r}: its network takes {width} numbers of added conditions, but six of sizes and "
                f"crop with the pooled text are {pooled + 6 * unet.addition_time_embed_dim}; a refiner, which takes "
                "an aesthetic score, is no text-to-image model: use the base model"
            )

    @torch.no_grad()
    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """The last but one hidden states of both encoders `(N, L, D)`, packed with the pooled output of the second."""
        first, second = self.token_ids(tokens)
        one = self.text_encoder(first, output_hidden_states=True)
        two = self.text_encoder_2(second, output_hidden_states=True)
        return pack_pooled(torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1), two.text_embeds)

    @torch.no_grad()
    def embed_null(self) -> torch.Tensor:
        """Embedding that guidance pushes away from: zeros where the pipeline says `force_zeros_for_empty_prompt`."""
        null = super().embed_null()
        return torch.zeros_like(null) if self.zeros_for_empty_prompt else null

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
        assert embeddings is not None
        hidden, pooled = unpack_pooled(embeddings, self.text_encoder_2.config.projection_dim)
        times = self._time_ids.to(hidden.dtype).expand(len(latents), -1)
        return unet(
            latents.to(self.dtype),
            timesteps,
            encoder_hidden_states=hidden,
            timestep_cond=self.guidance_condition(guidance_scale, len(latents)),
            added_cond_kwargs={"text_embeds": pooled, "time_ids": times},
            return_dict=False,
        )[0]

    def _unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the autoencoder made them, each channel with its mean and deviation where it names them."""
        vae = self.vae.config
        mean, std = (vae.get(name) for name in ("latents_mean", "latents_std"))
        if mean is None or std is None:
            return super()._unscaled(latents)
        mean, std = (latents.new_tensor(each).view(1, -1, 1, 1) for each in (mean, std))
        return latents * std / vae.scaling_factor + mean

    def _pipeline(self, unet: nn.Module, scheduler: Any) -> Any:
        """Diffusers' pipeline of the model's parts with `unet`."""
        from diffusers import StableDiffusionXLPipeline

        return StableDiffusionXLPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            text_encoder_2=self.text_encoder_2,
            tokenizer=self.tokenizer,
            tokenizer_2=self.tokenizer_2,
            unet=unet,
            scheduler=scheduler,
            force_zeros_for_empty_prompt=self.zeros_for_empty_prompt,
            add_watermarker=False,
        )

    def save_lora(self, folder: str | Path, unet: nn.Module) -> None:
        """Write the adapters of `unet` so that `StableDiffusionXLPipeline.load_lora_weights` reads them."""
        with quiet():
            from diffusers import StableDiffusionXLPipeline

        export_adapters(folder, StableDiffusionXLPipeline, "unet", unet)
