"""Latent text-to-image models: Stable Diffusion 1.x and 2.x, and what all families with an autoencoder share."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from torch import nn

from diffusion_gym.config import SamplerConfig
from diffusion_gym.devices import device_called
from diffusion_gym.hub import MODEL_SOURCES, located, located_file
from diffusion_gym.images import to_unit
from diffusion_gym.models.base import ATTENTION, FAMILIES, MODELS
from diffusion_gym.models.checkpoint import Checkpoint, sides, token_limit
from diffusion_gym.models.embedding_store import EmbeddingStore, TextEncoders
from diffusion_gym.models.embeddings import guidance_embedding
from diffusion_gym.models.fields import INDEX, TEXT_ENCODER, UNET, VAE, Allowed, absent_parts, check_index, check_parts
from diffusion_gym.models.quiet import quiet
from diffusion_gym.models.saving import export_adapters, export_pipeline
from diffusion_gym.models.schedulers import ddim_scheduler, read_scheduler, stated, step_table
from diffusion_gym.pretrained import fingerprint
from diffusion_gym.scheduling import StepTable
from diffusion_gym.storage import read_json

_PIXELS_A_DECODE = 2**22  # 16 pictures of 512x512: bounds the memory of the VAE


@FAMILIES.register("StableDiffusionPipeline")
class LatentModel:
    """A Stable Diffusion directory or hub id; see `DenoisingModel` for the attributes.

    A family is a subclass in a file of its own, registered in `FAMILIES` under the class of its pipeline. Diffusers'
    pipeline is `pipe`: what it does by itself (encode prompts, pack latents), a family leaves to it.

    Args:
        source: a diffusers pipeline directory, or a hub id.
        device: where the weights go.
        dtype: type of the weights.
        name: what to call it; `source` by default.
        sampler_defaults: the model's own defaults for `SamplerConfig`.
        default_prompts: name of its default prompt set.
        revision: branch, tag or commit of a hub id.
        variant: such as `fp16`, the weight files to take where there are several.
        text_encoder_device: where the text encoders go; `device` by default.
        embedding_cache: a folder in which the embeddings of prompts are kept; by default none is.
        network_device: where the network that trains is loaded, to be spread over processes from there; `device` by
            default.

    Raises:
        FileNotFoundError: `source` is neither a pipeline directory nor at hand from the hub.
        ValueError: a config asks for what changes the samples and is not followed here; a part is of another class, its
            files do not hold its weights, or the parts do not fit each other.
    """

    PIPELINE: ClassVar[str] = "StableDiffusionPipeline"
    NETWORK: ClassVar[str] = "unet"  # the part that trains, called `unet` in `DenoisingModel` whatever its kind
    PARTS: ClassVar[Mapping[str, str]] = {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
    }  # besides the scheduler, by sub-folder the class of diffusers or transformers
    OPTIONAL: ClassVar[Collection[str]] = ()  # parts that an index may name as null
    FIELDS: ClassVar[Mapping[str, Allowed]] = {"unet": UNET, "vae": VAE, "text_encoder": TEXT_ENCODER}
    INDEX: ClassVar[Allowed] = INDEX
    SAMPLER_DEFAULTS: ClassVar[Mapping[str, Any]] = {}
    lora_targets: ClassVar[Sequence[str]] = ATTENTION

    unet: nn.Module
    vae: Any
    tokenizer: Any
    tokenizer_2: Any
    tokenizer_3: Any
    text_encoder: Any
    text_encoder_2: Any
    text_encoder_3: Any

    def __init__(
        self,
        source: str | Path,
        *,
        device: torch.device,
        dtype: torch.dtype,
        name: str | None = None,
        sampler_defaults: Mapping[str, Any] | None = None,
        default_prompts: str = "imagenet-animals",
        revision: str | None = None,
        variant: str | None = None,
        text_encoder_device: str | None = None,
        embedding_cache: str | None = None,
        network_device: str | None = None,
    ) -> None:
        parts = [*self._present(str(source), revision), "scheduler"]
        folder = located(str(source), parts, revision=revision, variant=variant)
        self.files = folder, fingerprint(folder)
        self.name = name or str(source)
        self.device, self.dtype = device, dtype
        self.text_device = device if text_encoder_device is None else device_called(text_encoder_device)
        self.default_prompts = default_prompts
        self.negative_prompt = ""
        with quiet():
            network = device if network_device is None else device_called(network_device)
            checkpoint = Checkpoint(folder, device, dtype, variant, self.name, self.text_device, network)
            self.index = checkpoint.index
            check_index(self.name, self.index, self.INDEX)
            check_parts(self.name, folder, self.FIELDS)
            scheduler = self._scheduler(read_scheduler(self.name, folder, "scheduler", self.index))
            self.parts = {part: checkpoint.part(kind, part) for part, kind in self.PARTS.items() if part in parts}
            for part in self.PARTS:
                setattr(self, part, self.parts.setdefault(part, None))
            self.unet = self.parts[self.NETWORK]
            self._prepare()
            self.text_encoders = TextEncoders(checkpoint, self.parts, self.files[1])
            self.tokenizer_files = checkpoint.tokenizer_files()
            # The constructor corrects outdated configs, of the scheduler and of the network, in place.
            self.pipe = self._pipeline(self.unet, scheduler)
            self.scheduler_config: Mapping[str, Any] = stated(self.pipe.scheduler)
        self.tokenizers: list[tuple[Any, int]] = self._tokenizers()
        self.store = None if embedding_cache is None else EmbeddingStore(embedding_cache, self._encoders_key())
        self.prompt_length = sum(length for _, length in self.tokenizers)
        self.vocab_size = max(len(tokenizer) for tokenizer, _ in self.tokenizers)
        self.num_train_timesteps: int = self.scheduler_config["num_train_timesteps"]
        self.channels, self.scale = self._channels(), self._scale()
        self._set_size(*self._default_size())
        self.sampler_defaults: Mapping[str, Any] = {**self._sampler_defaults(), **(sampler_defaults or {})}

    @classmethod
    def register(cls, *names: str, **sampler_defaults: Any) -> None:
        """Enter models of the family in `MODELS`, whose hub ids are in `MODEL_SOURCES`.

        Args:
            *names: of the models.
            **sampler_defaults: their own defaults for `SamplerConfig`, over those of the family.
        """
        for name in names:
            options: dict[str, Any] = {"name": name, "sampler_defaults": sampler_defaults}
            MODELS.register(name, traits=("prompt", "photo", "face"))(partial(cls, MODEL_SOURCES[name], **options))

    # --- what a family says of itself ------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Correct the parts before the pipeline is made of them."""

    def _scheduler(self, config: Mapping[str, Any]) -> Any:
        """The scheduler of our sampler, in the place of the folder's own."""
        return ddim_scheduler(self.name, config)

    def _pipeline_options(self) -> dict[str, Any]:
        """Keywords of the pipeline's constructor besides the parts."""
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

    def _tokenizers(self) -> list[tuple[Any, int]]:
        """The tokenizers, each with the number of its token ids in a row."""
        return [(self.tokenizer, token_limit(self.tokenizer, self.text_encoder, self.name))]

    def _channels(self) -> int:
        """Channels of a latent."""
        unet: Any = self.unet.config
        latents = self.vae.config.latent_channels
        if not unet.in_channels == unet.out_channels == latents:
            raise ValueError(
                f"model={self.name!r}: its network has {unet.in_channels} channels in and {unet.out_channels} out, its "
                f"autoencoder {latents}; use a text-to-image model, where they are equal"
            )
        return int(latents)

    def _scale(self) -> int:
        """Pixels of a picture for one of the latents, along each side."""
        return int(self.pipe.vae_scale_factor)

    def _default_size(self) -> tuple[int, int]:
        """Height and width of the pipeline's own pictures, in pixels."""
        unet: Any = self.unet.config
        height, width = sides(unet.sample_size, self.name)
        return height * self.scale, width * self.scale

    def _size_factor(self) -> tuple[int, int | None]:
        """What height and width are multiples of, and their largest value, in pixels."""
        return self.scale, None

    def _sampler_defaults(self) -> Mapping[str, Any]:
        return self.SAMPLER_DEFAULTS

    def _encode(self, *token_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings `(N, L, D)` of the token ids of each tokenizer, on the text encoders' device."""
        return self.text_encoder(*token_ids)[0]

    def _unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the autoencoder made them, as the family's pipeline in diffusers scales them back."""
        return latents / self.vae.config.scaling_factor

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures `(N, 3, H, W)` in [-1, 1] of latents on the autoencoder's device and in its type."""
        return self.vae.decode(self._unscaled(latents), return_dict=False)[0]

    def _lora_names(self) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        """From peft's names of adapters to those that the pipeline's `save_lora_weights` takes."""
        from diffusers.utils import convert_state_dict_to_diffusers

        return convert_state_dict_to_diffusers

    # --- sizes and prompts -----------------------------------------------------------------------------------------

    def with_options(self, *, height: int | None = None, width: int | None = None, negative_prompt: str = "") -> Self:
        """This model for pictures of another size, or with another prompt to push away from; it shares the weights.

        Args:
            height: in pixels; this model's by default.
            width: in pixels; this model's by default.
            negative_prompt: what guidance pushes away from.

        Raises:
            ValueError: a size that the model cannot make.
        """
        other = copy.copy(self)
        other.whole = self  # which stays in the cache of models while this one is in use
        other.negative_prompt = negative_prompt
        own = self.image_shape
        other._set_size(own[0] if height is None else height, own[1] if width is None else width)
        return other

    whole: LatentModel | None = None

    def _set_size(self, height: int, width: int) -> None:
        factor, largest = self._size_factor()
        for name, side in (("height", height), ("width", width)):
            if not isinstance(side, int) or isinstance(side, bool) or side < factor or side % factor:
                below = max(factor, int(side) // factor * factor) if isinstance(side, int | float) else factor
                raise ValueError(
                    f"{name}={side!r} is no size of model={self.name!r}; use a multiple of {factor} pixels, such as "
                    f"{below} or {below + factor}"
                )
            if largest is not None and side > largest:
                raise ValueError(
                    f"{name}={side!r} is larger than model={self.name!r} has positions for; use at most {largest}"
                )
        self.latent_shape: tuple[int, int, int] = (self.channels, height // self.scale, width // self.scale)
        self.image_shape: tuple[int, int, int] = (height, width, 3)

    def _present(self, source: str, revision: str | None) -> Sequence[str]:
        """The parts that the pipeline has."""
        if not self.OPTIONAL:
            return list(self.PARTS)
        index = read_json(located_file(source, "model_index.json", argument="model", revision=revision))
        return [part for part in self.PARTS if part not in absent_parts(self.OPTIONAL, index)]

    @cached_property
    def _guidance_width(self) -> int | None:
        unet: Any = self.unet.config
        return unet.get("time_cond_proj_dim")

    @property
    def embeds_guidance(self) -> bool:
        """Whether the network is told the guidance scale."""
        return self._guidance_width is not None

    # --- what `DenoisingModel` asks for ----------------------------------------------------------------------------

    def step_table(self, config: SamplerConfig) -> StepTable:
        """Coefficients of the T steps of `config`, float64 on the CPU; see `step_table`.

        Raises:
            ValueError: a negative prompt without guidance, which has no effect.
        """
        self._check_guidance(config)
        return step_table(self.scheduler_config, config)

    def _check_guidance(self, config: SamplerConfig) -> None:
        """Refuse guidance that would have no effect."""
        if self.negative_prompt and (config.guidance_scale == 1 or self.embeds_guidance):
            raise ValueError(
                f"negative_prompt={self.negative_prompt!r} has no effect on model={self.name!r} at "
                f"guidance_scale={config.guidance_scale!r}, where one prediction is all there is; leave it out"
                + ("" if self.embeds_guidance else ", or use a larger guidance_scale")
            )

    def tokenize(self, prompts: Sequence[str]) -> torch.Tensor:
        """Token ids: int64 `(N, L)` on the CPU, padded and cut; those of several tokenizers side by side."""
        parts = [
            tokenizer(
                self._written(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            ).input_ids
            for tokenizer, length in self.tokenizers
        ]
        return torch.cat(parts, dim=1)

    def _written(self, prompts: Sequence[str]) -> list[str]:
        """Prompts as the tokenizers are given them."""
        return list(prompts)

    @torch.no_grad()
    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the text encoders make of tokens `(N, L)`, `(N, L, D)` on the model's device."""
        lengths = [length for _, length in self.tokenizers]
        return self._encoded(*tokens.split(lengths, dim=1)).to(self.device)

    def _encoded(self, *token_ids: torch.Tensor) -> torch.Tensor:
        """`_encode` of token ids, or what the store has of it; text encoders that have left are loaded for that."""
        if self.store is None and not self.text_encoders.released:
            return self._encode(*(ids.to(self.text_device) for ids in token_ids))
        rows = list(zip(*(ids.split(1) for ids in token_ids), strict=True))

        def encode(places: Sequence[int]) -> list[torch.Tensor]:
            with self.text_encoders.present():
                return [self._encode(*(ids.to(self.text_device) for ids in rows[place])) for place in places]

        return torch.cat(encode(range(len(rows)))) if self.store is None else self.store.embeddings(rows, encode)

    def _encoders_key(self) -> str:
        """What tells the embeddings of this model from those of others; some are packed for the network."""
        own = {name: value for name, value in cast(Any, self.unet.config).items() if not name.startswith("_")}
        tokens = [(length, tokenizer.pad_token_id) for tokenizer, length in self.tokenizers]
        return self.text_encoders.key([type(self).__name__, own, tokens, self.text_device.type])

    def embed_null(self) -> torch.Tensor:
        """Embedding `(1, L, D)` that guidance pushes away from: that of the negative prompt, which is empty."""
        return self.embed(self.tokenize([self.negative_prompt]))

    def guidance_condition(self, guidance_scale: float, number: int) -> torch.Tensor | None:
        """What the network is told of the guidance scale, `(number, width)`; None where it is not told."""
        if self._guidance_width is None:
            return None
        embedding = guidance_embedding(guidance_scale, self._guidance_width)
        return embedding.to(self.device, self.dtype).expand(number, -1)

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
        return self._predict(unet, latents.to(self.dtype), timesteps, embeddings, guidance_scale)

    def _predict(
        self, unet: nn.Module, latents: torch.Tensor, timesteps: torch.Tensor, embeddings: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """The family's call of its network, with x_t in the dtype of the weights."""
        return unet(
            latents,
            timesteps,
            encoder_hidden_states=embeddings,
            timestep_cond=self.guidance_condition(scale, len(latents)),
            return_dict=False,
        )[0]

    @property
    def _pictures_at_once(self) -> int:
        """Of the autoencoder, whose memory it bounds."""
        return max(1, _PIXELS_A_DECODE // (self.image_shape[0] * self.image_shape[1]))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures of latents `(N, C, H, W)`: float32 `(N, 3, H, W)` in [0, 1], with their gradient."""
        parts = latents.to(self.device, self.vae.dtype).split(self._pictures_at_once)
        return to_unit(torch.cat([self._decode(part).float() for part in parts]))

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Latents of pictures `(N, 3, H, W)` in [0, 1], float32 `(N, C, H, W)`: the mean that the autoencoder gives."""
        pixels = images.to(self.device, self.vae.dtype) * 2 - 1
        parts = pixels.split(self._pictures_at_once)
        raw = torch.cat([self.vae.encode(part).latent_dist.mean.float() for part in parts])
        shift = self._unscaled(torch.zeros_like(raw[:1]))  # the scaling of each family is affine
        return (raw - shift) / (self._unscaled(torch.ones_like(raw[:1])) - shift)

    def _pipeline(self, network: nn.Module, scheduler: Any) -> Any:
        """Diffusers' pipeline of the model's parts with `network` as the one that trains."""
        import diffusers

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # that a config is outdated, and is corrected
            parts = {**self.parts, self.NETWORK: network, "scheduler": scheduler}
            return getattr(diffusers, self.PIPELINE)(**parts, **self._pipeline_options())

    def save_pipeline(self, folder: str, unet: nn.Module) -> None:
        """Write a directory of the model's pipeline class with `unet` in it, in the dtype of its weights.

        Its scheduler is that of the model's step tables.
        """
        with quiet(), self.text_encoders.present():
            export_pipeline(folder, self._pipeline(unet, self._scheduler(self.scheduler_config)), self.tokenizer_files)

    def save_lora(self, folder: str | Path, unet: nn.Module) -> None:
        """Write the adapters of `unet` so that `load_lora_weights` of the model's diffusers pipeline reads them."""
        export_adapters(folder, type(self.pipe), self.NETWORK, unet, self._lora_names())


LatentModel.register("SD14", "SD15")
