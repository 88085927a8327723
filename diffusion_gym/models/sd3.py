"""Stable Diffusion 3: a flow-matching transformer with three text encoders."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import pad

from diffusion_gym.models.base import FAMILIES
from diffusion_gym.models.checkpoint import token_limit
from diffusion_gym.models.embeddings import pack_pooled, unpack_pooled
from diffusion_gym.models.flow import FlowModel
from diffusion_gym.models.latent import LatentModel
from diffusion_gym.models.repeated_token import RepeatedTokenAttention

_T5_TOKENS = 256  # what diffusers' pipeline gives the T5 encoder


def _repeats(network: Any) -> bool:
    """Whether a transformer takes its last context token for many."""
    return isinstance(network.transformer_blocks[0].attn.processor, RepeatedTokenAttention)


@FAMILIES.register("StableDiffusion3Pipeline")
class SD3Model(FlowModel):
    """A `StableDiffusion3Pipeline` directory or hub id; arguments and errors as `LatentModel`.

    Prompts are the token ids of all tokenizers side by side. Their embedding is the two CLIP encoders' of each token,
    after it T5's, and in a last row the pooled one. A pipeline saved with `text_encoder_3=None` goes without T5, and so
    does one whose T5 has embeddings of zeros only. Diffusers' 256 tokens of zeros are then one that counts 256 times,
    which is the same (`RepeatedTokenAttention`).
    """

    PIPELINE: ClassVar[str] = "StableDiffusion3Pipeline"
    PARTS: ClassVar[Mapping[str, str]] = {
        "transformer": "SD3Transformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "text_encoder_3": "T5EncoderModel",
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "CLIPTokenizer",
        "tokenizer_3": "T5TokenizerFast",
    }
    OPTIONAL: ClassVar[Collection[str]] = ("text_encoder_3", "tokenizer_3")
    EVEN_STEPS: ClassVar[bool] = False

    def _prepare(self) -> None:
        network: Any = self.unet.config
        self.patch = network.patch_size
        self.has_t5 = self.text_encoder_3 is not None and bool(self.text_encoder_3.shared.weight.any())
        if not self.has_t5:  # T5 has no biases: from zeros it makes zeros
            transformer: Any = self.unet
            transformer.set_attn_processor(RepeatedTokenAttention(_T5_TOKENS))

    def _tokenizers(self) -> list[tuple[Any, int]]:
        limit = token_limit(self.tokenizer, self.text_encoder, self.name)  # diffusers' for both
        t5 = [(self.tokenizer_3, _T5_TOKENS)] if self.has_t5 else []
        return [(self.tokenizer, limit), (self.tokenizer_2, limit), *t5]

    def _channels(self) -> int:
        return LatentModel._channels(self)

    def _default_size(self) -> tuple[int, int]:
        return LatentModel._default_size(self)

    def _size_factor(self) -> tuple[int, int | None]:
        network: Any = self.unet.config
        factor = self.scale * self.patch
        return factor, factor * network.pos_embed_max_size

    def _encode(self, *token_ids: torch.Tensor) -> torch.Tensor:
        """Hidden states of the encoders, packed with the pooled outputs of the two CLIP ones: `(N, rows, D)`."""
        first, second, *third = token_ids
        one = self.text_encoder(first, output_hidden_states=True)
        two = self.text_encoder_2(second, output_hidden_states=True)
        clip = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
        config: Any = self.unet.config
        width: int = config.joint_attention_dim
        t5 = self.text_encoder_3(*third)[0].to(clip.dtype) if third else clip.new_zeros(len(clip), 1, width)
        hidden = torch.cat([pad(clip, (0, width - clip.shape[-1])), t5], dim=1)
        return pack_pooled(hidden, torch.cat([one.text_embeds, two.text_embeds], dim=-1))

    def _predict(
        self, unet: nn.Module, latents: torch.Tensor, timesteps: torch.Tensor, embeddings: torch.Tensor, scale: float
    ) -> torch.Tensor:
        config: Any = self.unet.config
        hidden, pooled = unpack_pooled(embeddings, config.pooled_projection_dim)
        if not self.has_t5 and not _repeats(unet):  # a network of somebody else's, which is to see all zeros
            hidden = torch.cat([hidden, hidden[:, -1:].expand(-1, _T5_TOKENS - 1, -1)], dim=1)
        return unet(
            hidden_states=latents,
            timestep=timesteps,
            encoder_hidden_states=hidden,
            pooled_projections=pooled,
            return_dict=False,
        )[0]


SD3Model.register("SD35Medium")
