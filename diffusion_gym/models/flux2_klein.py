"""FLUX.2 [klein]: latents are patches of 2x2 that the autoencoder normalises, prompts three layers of Qwen3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from diffusion_gym.models.base import FAMILIES
from diffusion_gym.models.fields import Allowed
from diffusion_gym.models.flow import FlowModel


@FAMILIES.register("Flux2KleinPipeline")
class Flux2KleinModel(FlowModel):
    """A `Flux2KleinPipeline` directory or hub id; arguments and errors as `LatentModel`.

    x_t has 4 channels for each of the autoencoder's, and half its height and width.
    """

    PIPELINE: ClassVar[str] = "Flux2KleinPipeline"
    PARTS: ClassVar[Mapping[str, str]] = {
        "transformer": "Flux2Transformer2DModel",
        "vae": "AutoencoderKLFlux2",
        "text_encoder": "Qwen3ForCausalLM",
        "tokenizer": "Qwen2TokenizerFast",
    }
    FIELDS: ClassVar[Mapping[str, Allowed]] = {"transformer": {"guidance_embeds": (False, None)}}
    INDEX: ClassVar[Allowed] = {"is_distilled": (False, True)}
    SAMPLER_DEFAULTS: ClassVar[Mapping[str, Any]] = {**FlowModel.SAMPLER_DEFAULTS, "guidance_scale": 4.0}
    patch = 1

    @property
    def distilled(self) -> bool:
        """Whether the network needs no guidance, as the pipeline's index says."""
        return bool(self.index.get("is_distilled", False))

    def _pipeline_options(self) -> dict[str, Any]:
        return {"is_distilled": self.distilled}

    def _tokenizers(self) -> list[tuple[Any, int]]:
        return [(self.tokenizer, self.TOKENS)]

    def _written(self, prompts: Sequence[str]) -> list[str]:
        return self._chats(prompts, enable_thinking=False)

    def _scale(self) -> int:
        return 2 * super()._scale()

    def _latent_channels(self) -> int:
        return 4 * int(self.vae.config.latent_channels)

    def _default_size(self) -> tuple[int, int]:
        side = int(self.pipe.default_sample_size * self.pipe.vae_scale_factor)
        return side, side

    def _shift(self, patches: int, steps: int) -> float:
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        return float(compute_empirical_mu(patches, steps))

    def _encode_prompt(self, pipe: Any) -> torch.Tensor:
        hidden: torch.Tensor = pipe.encode_prompt("", device=self.text_device)[0]
        return hidden

    def _packed(self, latents: torch.Tensor) -> torch.Tensor:
        packed: torch.Tensor = self.pipe._pack_latents(latents.to(self.dtype))
        return packed

    def _unpacked(self, patches: torch.Tensor) -> torch.Tensor:
        return patches.transpose(1, 2).reshape(len(patches), *self.latent_shape)

    def _velocity(
        self, unet: nn.Module, patches: torch.Tensor, times: torch.Tensor, embeddings: torch.Tensor, scale: float
    ) -> torch.Tensor:
        places = self.pipe._prepare_latent_ids(patches.new_empty(1, 1, *self.latent_shape[1:]))
        return unet(
            hidden_states=patches,
            timestep=times,
            guidance=None,
            encoder_hidden_states=embeddings,
            txt_ids=self.pipe._prepare_text_ids(embeddings[:1]).to(self.device),
            img_ids=places.to(self.device),
            return_dict=False,
        )[0]

    def _unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the autoencoder made them: with the mean and deviation of its batch norm, and in no patches."""
        norm = self.vae.bn
        mean, variance = (each.view(1, -1, 1, 1).to(latents) for each in (norm.running_mean, norm.running_var))
        restored = latents * (variance + self.vae.config.batch_norm_eps).sqrt() + mean
        unpatched: torch.Tensor = self.pipe._unpatchify_latents(restored)
        return unpatched


Flux2KleinModel.register("FLUX2Klein")
