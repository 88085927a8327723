"""Stable Diffusion XL: two text encoders, and a UNet that is also told the size of the picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from diffusion_gym.models.base import FAMILIES
from diffusion_gym.models.checkpoint import token_limit
from diffusion_gym.models.embeddings import pack_pooled, unpack_pooled
from diffusion_gym.models.fields import XL_INDEX, XL_UNET, XL_VAE, Allowed
from diffusion_gym.models.latent import LatentModel


@FAMILIES.register("StableDiffusionXLPipeline")
class SDXLModel(LatentModel):
    """A `StableDiffusionXLPipeline` directory or hub id; arguments and errors as `LatentModel`.

    Prompts are the token ids of both tokenizers side by side. Their embedding is that of each token by both encoders,
    and in a last row the pooled one. The other added conditions are constant: the original and the target size are
    the picture's own, the crop begins at (0, 0).
    """

    PIPELINE: ClassVar[str] = "StableDiffusionXLPipeline"
    PARTS: ClassVar[Mapping[str, str]] = {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "CLIPTokenizer",
    }
    FIELDS: ClassVar[Mapping[str, Allowed]] = {"unet": XL_UNET, "vae": XL_VAE}
    INDEX: ClassVar[Allowed] = XL_INDEX

    def _prepare(self) -> None:
        if self.dtype == torch.float16 and self.vae.config.force_upcast:
            self.vae.float()  # it overflows in float16; diffusers' pipeline upcasts it to decode
        self.zeros_for_empty_prompt = bool(self.index.get("force_zeros_for_empty_prompt", True))
        unet: Any = self.unet.config
        pooled, width = self.text_encoder_2.config.projection_dim, unet.projection_class_embeddings_input_dim
        if unet.addition_embed_type == "text_time" and pooled + 6 * unet.addition_time_embed_dim != width:
            raise ValueError(
                f"model={self.name!r}: its network takes {width} numbers of added conditions, but six of sizes and "
                f"crop with the pooled text are {pooled + 6 * unet.addition_time_embed_dim}; a refiner, which takes "
                "an aesthetic score, is no text-to-image model: use the base model"
            )

    def _pipeline_options(self) -> dict[str, Any]:
        return {"force_zeros_for_empty_prompt": self.zeros_for_empty_prompt, "add_watermarker": False}

    def _tokenizers(self) -> list[tuple[Any, int]]:
        pairs = ((self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2))
        return [(each, token_limit(each, encoder, self.name)) for each, encoder in pairs]

    def _set_size(self, height: int, width: int) -> None:
        super()._set_size(height, width)
        self._time_ids = torch.tensor([[height, width, 0, 0, height, width]], device=self.device)

    def _encode(self, *token_ids: torch.Tensor) -> torch.Tensor:
        """The last but one hidden states of both encoders `(N, L, D)`, packed with the pooled output of the second."""
        first, second = token_ids
        one = self.text_encoder(first, output_hidden_states=True)
        two = self.text_encoder_2(second, output_hidden_states=True)
        return pack_pooled(torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1), two.text_embeds)

    def embed_null(self) -> torch.Tensor:
        """Embedding that guidance pushes away from: zeros where the pipeline says `force_zeros_for_empty_prompt`."""
        null = super().embed_null()
        return torch.zeros_like(null) if self.zeros_for_empty_prompt and not self.negative_prompt else null

    def _predict(
        self, unet: nn.Module, latents: torch.Tensor, timesteps: torch.Tensor, embeddings: torch.Tensor, scale: float
    ) -> torch.Tensor:
        hidden, pooled = unpack_pooled(embeddings, self.text_encoder_2.config.projection_dim)
        times = self._time_ids.to(hidden.dtype).expand(len(latents), -1)
        return unet(
            latents,
            timesteps,
            encoder_hidden_states=hidden,
            timestep_cond=self.guidance_condition(scale, len(latents)),
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

    def _lora_names(self) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        return dict
