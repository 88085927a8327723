"""FLUX.1: dev, whose network is told the guidance scale, and schnell, which is distilled to need no guidance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from diffusion_gym.models.base import FAMILIES
from diffusion_gym.models.checkpoint import token_limit
from diffusion_gym.models.embeddings import pack_pooled, unpack_pooled
from diffusion_gym.models.flow import FlowModel


@FAMILIES.register("FluxPipeline")
class FluxModel(FlowModel):
    """A `FluxPipeline` directory or hub id; arguments and errors as `LatentModel`.

    Prompts are the token ids of both tokenizers side by side. Their embedding is T5's of each token, and in a last row
    CLIP's pooled one.
    """

    PIPELINE: ClassVar[str] = "FluxPipeline"
    PARTS: ClassVar[Mapping[str, str]] = {
        "transformer": "FluxTransformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "T5EncoderModel",
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "T5TokenizerFast",
    }
    SAMPLER_DEFAULTS: ClassVar[Mapping[str, Any]] = {**FlowModel.SAMPLER_DEFAULTS, "guidance_scale": 3.5}

    @property
    def embeds_guidance(self) -> bool:
        """Whether the network is told the guidance scale, as that of dev is."""
        network: Any = self.unet.config
        return bool(network.guidance_embeds)

    @property
    def distilled(self) -> bool:
        """Whether the network needs no guidance, as that of schnell."""
        return not self.embeds_guidance

    def _tokenizers(self) -> list[tuple[Any, int]]:
        clip = token_limit(self.tokenizer, self.text_encoder, self.name)
        return [(self.tokenizer, clip), (self.tokenizer_2, self.TOKENS)]

    def _encode_prompt(self, pipe: Any) -> torch.Tensor:
        hidden, pooled, _ = pipe.encode_prompt("", device=self.text_device)
        return pack_pooled(hidden, pooled)

    def _velocity(
        self, unet: nn.Module, patches: torch.Tensor, times: torch.Tensor, embeddings: torch.Tensor, scale: float
    ) -> torch.Tensor:
        network: Any = self.unet.config
        hidden, pooled = unpack_pooled(embeddings, network.pooled_projection_dim)
        _, height, width = self.latent_shape
        place: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        return unet(
            hidden_states=patches,
            timestep=times,
            guidance=times.new_full((len(times),), scale, dtype=torch.float32) if self.embeds_guidance else None,
            pooled_projections=pooled,
            encoder_hidden_states=hidden,
            txt_ids=torch.zeros(hidden.shape[1], 3, **place),
            img_ids=self.pipe._prepare_latent_image_ids(len(patches), height // 2, width // 2, **place),
            return_dict=False,
        )[0]


FluxModel.register("FLUX1Dev", "FLUX1Schnell")
