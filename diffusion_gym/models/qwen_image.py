"""Qwen-Image: prompts as a language model reads them, and guidance that keeps the norm of the prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import pad

from diffusion_gym import scheduling
from diffusion_gym.models.base import FAMILIES
from diffusion_gym.models.embeddings import valid_tokens
from diffusion_gym.models.fields import Allowed
from diffusion_gym.models.flow import FlowModel


@FAMILIES.register("QwenImagePipeline")
class QwenImageModel(FlowModel):
    """A `QwenImagePipeline` directory or hub id; arguments and errors as `LatentModel`.

    A prompt's embedding is filled up with zeros to 512 tokens; the network sees those of the longest prompt of a batch.
    """

    PIPELINE: ClassVar[str] = "QwenImagePipeline"
    PARTS: ClassVar[Mapping[str, str]] = {
        "transformer": "QwenImageTransformer2DModel",
        "vae": "AutoencoderKLQwenImage",
        "text_encoder": "Qwen2_5_VLForConditionalGeneration",
        "tokenizer": "Qwen2Tokenizer",
    }
    FIELDS: ClassVar[Mapping[str, Allowed]] = {"transformer": {"guidance_embeds": (False, None)}}
    SAMPLER_DEFAULTS: ClassVar[Mapping[str, Any]] = {**FlowModel.SAMPLER_DEFAULTS, "guidance_scale": 4.0}
    TRIMS: ClassVar[bool] = True

    def _tokenizers(self) -> list[tuple[Any, int]]:
        return [(self.tokenizer, self.pipe.prompt_template_encode_start_idx + self.TOKENS)]

    def _written(self, prompts: Sequence[str]) -> list[str]:
        return [self.pipe.prompt_template_encode.format(prompt) for prompt in prompts]

    def _encode_prompt(self, pipe: Any) -> torch.Tensor:
        hidden, _ = pipe.encode_prompt("", device=self.text_device)
        return pad(hidden, (0, 0, 0, self.TOKENS - hidden.shape[1]))

    def guide(self, conditional: torch.Tensor, unconditional: torch.Tensor, scale: float) -> torch.Tensor:
        """The guided prediction `(N, C, H, W)`, each patch of it with the norm of the conditional one."""
        guided = scheduling.guide(conditional, unconditional, scale)
        own, other = (self._packed(each).norm(dim=-1, keepdim=True) for each in (conditional, guided))
        return self._unpacked(self._packed(guided) * (own / other))

    def _velocity(
        self, unet: nn.Module, patches: torch.Tensor, times: torch.Tensor, embeddings: torch.Tensor, scale: float
    ) -> torch.Tensor:
        valid = valid_tokens(embeddings)
        longest = int(valid.sum(1).max())  # waits for a GPU; the rest of the 512 tokens would cost more
        valid = valid[:, :longest]
        _, height, width = self.latent_shape
        return unet(
            hidden_states=patches,
            timestep=times,
            encoder_hidden_states=embeddings[:, :longest],
            encoder_hidden_states_mask=None if bool(valid.all()) else valid.long(),
            img_shapes=[[(1, height // 2, width // 2)]] * len(patches),
            return_dict=False,
        )[0]

    def _latent_channels(self) -> int:
        return int(self.vae.config.z_dim)

    def _unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the autoencoder made them, each channel with its mean and deviation."""
        vae = self.vae.config
        mean, std = (latents.new_tensor(each).view(1, -1, 1, 1) for each in (vae.latents_mean, vae.latents_std))
        return latents * std + mean

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(self._unscaled(latents)[:, :, None], return_dict=False)[0][:, :, 0]


QwenImageModel.register("QwenImage")
