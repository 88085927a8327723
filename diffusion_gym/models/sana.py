"""Sana: a small linear transformer on the latents of an autoencoder that compresses 32 times, with Gemma's prompts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from diffusion_gym.models.base import FAMILIES
from diffusion_gym.models.embeddings import valid_tokens
from diffusion_gym.models.fields import SCALED, Allowed
from diffusion_gym.models.flow import FlowModel
from diffusion_gym.models.latent import LatentModel


@FAMILIES.register("SanaPipeline")
class SanaModel(FlowModel):
    """A `SanaPipeline` directory or hub id; arguments and errors as `LatentModel`.

    A prompt is read after the pipeline's own instruction to enhance it, the negative prompt without. The rows of an
    embedding that are padding are zeros, which the network does not see.
    """

    PIPELINE: ClassVar[str] = "SanaPipeline"
    PARTS: ClassVar[Mapping[str, str]] = {
        "transformer": "SanaTransformer2DModel",
        "vae": "AutoencoderDC",
        "text_encoder": "Gemma2Model",
        "tokenizer": "GemmaTokenizerFast",
    }
    FIELDS: ClassVar[Mapping[str, Allowed]] = {"transformer": {"guidance_embeds": (False, None)}, "vae": SCALED}
    EVEN_STEPS: ClassVar[bool] = False
    TOKENS: ClassVar[int] = 300

    def _prepare(self) -> None:
        network: Any = self.unet.config
        self.patch = network.patch_size
        self.tokenizer.padding_side = "right"  # as the pipeline has it

    @property
    def _instruction(self) -> str:
        call = inspect.signature(type(self.pipe).__call__)
        return "\n".join(call.parameters["complex_human_instruction"].default)

    def _tokenizers(self) -> list[tuple[Any, int]]:
        return [(self.tokenizer, len(self.tokenizer.encode(self._instruction)) + self.TOKENS - 2)]

    def _written(self, prompts: Sequence[str]) -> list[str]:
        return [self._instruction + prompt for prompt in self.pipe._text_preprocessing(list(prompts))]

    def _channels(self) -> int:
        network: Any = self.unet.config
        return self._equal_channels(network.in_channels)

    def _default_size(self) -> tuple[int, int]:
        return LatentModel._default_size(self)

    def _encode_prompt(self, pipe: Any) -> torch.Tensor:
        hidden, mask, *_ = pipe.encode_prompt("", do_classifier_free_guidance=False, device=self.text_device)
        return hidden * mask[:, :, None].to(hidden.dtype)

    @torch.no_grad()
    def embed_null(self) -> torch.Tensor:
        """Embedding `(1, L, D)` that guidance pushes away from: the negative prompt's, without the instruction."""
        written = self.pipe._text_preprocessing([self.negative_prompt])
        length = {"padding": "max_length", "max_length": self.TOKENS, "truncation": True}
        ids = self.tokenizer(written, **length, return_tensors="pt").input_ids
        return self._encoded(ids).to(self.device)

    def _predict(
        self, unet: nn.Module, latents: torch.Tensor, timesteps: torch.Tensor, embeddings: torch.Tensor, scale: float
    ) -> torch.Tensor:
        network: Any = self.unet.config
        output = unet(
            latents,
            encoder_hidden_states=embeddings,
            encoder_attention_mask=valid_tokens(embeddings),
            timestep=timesteps * network.timestep_scale,
            return_dict=False,
        )[0]
        return output[:, : self.channels]  # some networks predict a variance too, which the pipeline does not use


SanaModel.register("Sana")
