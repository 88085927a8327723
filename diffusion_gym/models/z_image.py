"""Z-Image and Z-Image-Turbo: one stream of tokens, and a network that counts time from noise to picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import pad

from diffusion_gym.models.base import FAMILIES
from diffusion_gym.models.embeddings import valid_tokens
from diffusion_gym.models.flow import FlowModel


@FAMILIES.register("ZImagePipeline")
class ZImageModel(FlowModel):
    """A `ZImagePipeline` directory or hub id; arguments and errors as `LatentModel`.

    A prompt's embedding is filled up with zeros to 512 tokens, which the network does not see. Guidance of scale w is
    the pipeline's of w - 1; the default of 1, none at all, is what Turbo is distilled for.
    """

    PIPELINE: ClassVar[str] = "ZImagePipeline"
    PARTS: ClassVar[Mapping[str, str]] = {
        "transformer": "ZImageTransformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "Qwen3Model",
        "tokenizer": "Qwen2Tokenizer",
    }
    SAMPLER_DEFAULTS: ClassVar[Mapping[str, Any]] = {**FlowModel.SAMPLER_DEFAULTS, "guidance_scale": 1.0}
    TRIMS: ClassVar[bool] = True

    def _tokenizers(self) -> list[tuple[Any, int]]:
        return [(self.tokenizer, self.TOKENS)]

    def _written(self, prompts: Sequence[str]) -> list[str]:
        return self._chats(prompts, enable_thinking=True)

    def _channels(self) -> int:
        network: Any = self.unet
        return self._equal_channels(network.in_channels)

    def _default_size(self) -> tuple[int, int]:
        return 1024, 1024  # the pipeline's own

    def _encode_prompt(self, pipe: Any) -> torch.Tensor:
        [hidden], _ = pipe.encode_prompt([""], device=self.text_device, do_classifier_free_guidance=False)
        return pad(hidden, (0, 0, 0, self.TOKENS - len(hidden)))[None]

    def _predict(
        self, unet: nn.Module, latents: torch.Tensor, timesteps: torch.Tensor, embeddings: torch.Tensor, scale: float
    ) -> torch.Tensor:
        lengths = valid_tokens(embeddings).sum(1).tolist()  # waits for a GPU: the network takes a list of texts
        texts = [row[:length] for row, length in zip(embeddings, lengths, strict=True)]
        times = (self.num_train_timesteps - timesteps) / self.num_train_timesteps
        output = unet(list(latents[:, :, None]), times, texts, return_dict=False)[0]
        return -torch.stack(output).squeeze(2)


ZImageModel.register("ZImageTurbo")
