"""What families of flow-matching transformers share: x_t = (1 - t) x0 + t eps, and a network of patches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final

import torch
from torch import nn

from diffusion_gym.config import SamplerConfig
from diffusion_gym.models.base import ATTENTION
from diffusion_gym.models.fields import FLOW_VAE, PLAIN_INDEX, Allowed
from diffusion_gym.models.latent import LatentModel
from diffusion_gym.models.schedulers import flow_scheduler, flow_step_table, flow_timestep_arguments
from diffusion_gym.scheduling import StepTable

_TEXT_STREAM: Final = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


class TokenIds:
    """Stands in for a tokenizer of transformers where a prompt is token ids already.

    Args:
        ids: int64 `(1, L)`.
        mask: of the ids that are no padding, the same.
    """

    def __init__(self, ids: torch.Tensor, mask: torch.Tensor) -> None:
        self.ids, self.mask = ids, mask

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The ids, whatever the text."""
        from transformers import BatchEncoding

        return BatchEncoding({"input_ids": self.ids, "attention_mask": self.mask})

    def tokenize(self, text: str) -> list[str]:
        """No tokens that stand for several, as those of textual inversion do."""
        return []

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> str:
        """No text: it is in the ids already."""
        return ""


class FlowModel(LatentModel):
    """A flow-matching pipeline, whose encoding of prompts is diffusers' own; arguments and errors as `LatentModel`.

    The sampler's defaults are those of Flow-GRPO's training (arXiv:2505.05470).
    """

    NETWORK: ClassVar[str] = "transformer"
    FIELDS: ClassVar[Mapping[str, Allowed]] = {"vae": FLOW_VAE}
    INDEX: ClassVar[Allowed] = PLAIN_INDEX
    SAMPLER_DEFAULTS: ClassVar[Mapping[str, Any]] = {"num_inference_steps": 10, "guidance_scale": 4.5, "eta": 0.7}
    # The text's stream too, where the network has one, and the fused layers of single-stream blocks.
    lora_targets: ClassVar[Sequence[str]] = (*ATTENTION, *_TEXT_STREAM, "to_qkv_mlp_proj")
    EVEN_STEPS: ClassVar[bool] = True  # whether the pipeline gives its scheduler t = 1, 1 - 1/T, ..., 1/T
    TRIMS: ClassVar[bool] = False  # whether the text encoder is not to see padding
    TOKENS: ClassVar[int] = 512  # of a prompt for the last text encoder, as in the pipeline

    patch: int = 2  # latents of a patch, along each side

    def _scheduler(self, config: Mapping[str, Any]) -> Any:
        return flow_scheduler(self.name, config)

    def _pipeline_options(self) -> dict[str, Any]:
        return {}

    @property
    def distilled(self) -> bool:
        """Whether the network is distilled to need no guidance, and is not told a scale either."""
        return False

    def _sampler_defaults(self) -> Mapping[str, Any]:
        few = {"guidance_scale": 1.0, "num_inference_steps": 4} if self.distilled else {}
        return {**self.SAMPLER_DEFAULTS, **few}

    def _latent_channels(self) -> int:
        """Channels of a latent, by the autoencoder."""
        return int(self.vae.config.latent_channels)

    def _channels(self) -> int:
        network: Any = self.unet.config
        return self._equal_channels(network.in_channels // self.patch**2)

    def _equal_channels(self, found: int) -> int:
        if found != (latents := self._latent_channels()):
            raise ValueError(
                f"model={self.name!r}: its network takes {found} channels, its autoencoder makes {latents}; use a "
                "text-to-image model, where they are equal"
            )
        return latents

    def _default_size(self) -> tuple[int, int]:
        side = int(self.pipe.default_sample_size) * self.scale
        return side, side

    def _size_factor(self) -> tuple[int, int | None]:
        return self.scale * self.patch, None

    def _shift(self, patches: int, steps: int) -> float | None:
        """What a scheduler with dynamic shifting moves its timesteps by; None for the line that most have."""
        return None

    def step_table(self, config: SamplerConfig) -> StepTable:
        """Coefficients of the T steps of `config`, float64 on the CPU; see `flow_step_table`.

        Raises:
            ValueError: guidance of a model that is distilled to need none, or a negative prompt without guidance.
        """
        self._check_guidance(config)
        shift = self._shift(self._patches, config.num_inference_steps)
        return flow_step_table(self.scheduler_config, config, self._patches, even=self.EVEN_STEPS, shift=shift)

    @property
    def _patches(self) -> int:
        _, height, width = self.latent_shape
        return (height // self.patch) * (width // self.patch)

    def timestep_arguments(self, steps: int) -> dict[str, Any]:
        """What the pipeline tells a scheduler besides the number of steps."""
        shift = self._shift(self._patches, steps)
        return flow_timestep_arguments(self.scheduler_config, steps, self._patches, even=self.EVEN_STEPS, shift=shift)

    def _check_guidance(self, config: SamplerConfig) -> None:
        if config.guidance_scale != 1 and self.distilled:
            raise ValueError(
                f"guidance_scale={config.guidance_scale!r} is nothing to model={self.name!r}, which is distilled to "
                "need no guidance; leave it at 1"
            )
        super()._check_guidance(config)

    def _encode(self, *token_ids: torch.Tensor) -> torch.Tensor:
        """What the pipeline's own `encode_prompt` makes of token ids, one prompt at a time: `(N, L, D)`."""
        names = [name for name in self.PARTS if name.startswith("tokenizer")]
        encoded = []
        for rows in zip(*token_ids, strict=True):
            pipe = copy.copy(self.pipe)
            for name, row, (tokenizer, _) in zip(names, rows, self.tokenizers, strict=True):
                mask = row != tokenizer.pad_token_id
                ids = row[mask] if self.TRIMS else row
                vars(pipe)[name] = TokenIds(ids[None], (mask[mask] if self.TRIMS else mask)[None].long())
            encoded.append(self._encode_prompt(pipe))
        return torch.cat(encoded)

    def _chats(self, prompts: Sequence[str], **options: Any) -> list[str]:
        """Prompts as the only message of a chat, in the tokenizer's own template."""
        return [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, **options
            )
            for prompt in prompts
        ]

    def _encode_prompt(self, pipe: Any) -> torch.Tensor:
        """The embedding `(1, L, D)` of the one prompt that a pipeline's tokenizers hold, by its `encode_prompt`."""
        raise NotImplementedError

    def _unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the autoencoder made them: shifted as well as scaled."""
        return super()._unscaled(latents) + (self.vae.config.get("shift_factor") or 0.0)

    def _lora_names(self) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        return dict

    def _packed(self, latents: torch.Tensor) -> torch.Tensor:
        """Patches `(N, L, D)` of latents `(N, C, H, W)`, in the dtype of the weights."""
        packed: torch.Tensor = self.pipe._pack_latents(latents.to(self.dtype).contiguous(), *latents.shape)
        return packed

    def _unpacked(self, patches: torch.Tensor) -> torch.Tensor:
        """Latents `(N, C, H, W)` of patches `(N, L, D)`."""
        height, width, _ = self.image_shape
        return self.pipe._unpack_latents(patches, height, width, self.scale).view(len(patches), *self.latent_shape)

    def _predict(
        self, unet: nn.Module, latents: torch.Tensor, timesteps: torch.Tensor, embeddings: torch.Tensor, scale: float
    ) -> torch.Tensor:
        times = timesteps.to(self.dtype) / self.num_train_timesteps
        return self._unpacked(self._velocity(unet, self._packed(latents), times, embeddings, scale))

    def _velocity(
        self, unet: nn.Module, patches: torch.Tensor, times: torch.Tensor, embeddings: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """What the network makes of patches `(N, L, D)` at times `(N,)` in [0, 1], of the shape of the patches."""
        raise NotImplementedError
