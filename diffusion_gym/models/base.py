"""What the environment and the policy need of a diffusion model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final, Protocol, TypeVar

import torch
from torch import nn

from diffusion_gym.config import SamplerConfig
from diffusion_gym.registry import Registry
from diffusion_gym.scheduling import StepTable

U = TypeVar("U")

ADAPTER_FILES: Final = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # of diffusers and of peft
ATTENTION: Final = ("to_q", "to_k", "to_v", "to_out.0")  # the attention projections, as in diffusers and ddpo-pytorch


class DenoisingModel(Protocol):
    """A frozen, pretrained diffusion model; the environment decodes with it, the policy trains a copy of its UNet.

    A model whose diffusers pipeline has `load_lora_weights` also has a method `save_lora(folder, unet)`, which writes
    the adapters of `unet`; of any other model, a run with adapters is saved as a full pipeline, merged.

    A model that guidance pushes away from something other than the empty prompt also has a method `embed_null()`, its
    embedding `(1, L, D)`. A model whose network takes the guidance scale itself, so that one prediction is the guided
    one, has an attribute `embeds_guidance`, which is true; its `predict` has a keyword `guidance_scale`. A model whose
    guided prediction is another than `scheduling.guide` makes has a method `guide` with the same arguments. A model
    whose adapters are to be on other layers than `ATTENTION` has an attribute `lora_targets`.

    Attributes:
        name: the name or path that it was loaded by.
        unet: the frozen network.
        device: where its weights are.
        dtype: the type of its weights.
        latent_shape: (C, H, W) of x_t.
        image_shape: (H, W, 3) of a decoded picture.
        prompt_length: L, tokens of a prompt; 0 for an unconditional model.
        vocab_size: number of tokens; 0 for an unconditional model.
        num_train_timesteps: length of the noise schedule.
        sampler_defaults: the model's own defaults for `SamplerConfig`.
        default_prompts: name of the prompt set to use when none is given.
    """

    name: str
    unet: nn.Module
    device: torch.device
    dtype: torch.dtype
    latent_shape: tuple[int, int, int]
    image_shape: tuple[int, int, int]
    prompt_length: int
    vocab_size: int
    num_train_timesteps: int
    sampler_defaults: Mapping[str, Any]
    default_prompts: str

    def step_table(self, config: SamplerConfig) -> StepTable:
        """Coefficients of the T steps of `config`, float64 on the CPU.

        Raises:
            ValueError: T is larger than the schedule.
        """
        ...

    def tokenize(self, prompts: Sequence[str]) -> torch.Tensor:
        """Token ids of prompts: int64 `(N, L)` on the CPU."""
        ...

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Text embeddings of token ids `(N, L)`: `(N, L, D)` on the model's device."""
        ...

    def predict(
        self, unet: nn.Module, latents: torch.Tensor, timesteps: torch.Tensor, embeddings: torch.Tensor | None
    ) -> torch.Tensor:
        """Output `(N, C, H, W)` of `unet` (this model's, or a trained copy) in its own dtype.

        Args:
            unet: the network to run.
            latents: x_t, float32 `(N, C, H, W)`.
            timesteps: int64 `(N,)`, the scheduler's t.
            embeddings: `(N, L, D)`, or None for an unconditional model.
        """
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures of finished latents `(N, C, H, W)`: float32 `(N, 3, H, W)` in [0, 1].

        Latents with gradient give pictures with gradient.
        """
        ...

    def save_pipeline(self, folder: str, unet: nn.Module) -> None:
        """Write a pipeline directory that plain diffusers loads, with `unet` in place of this model's."""
        ...


def sampling_table(model: DenoisingModel, config: SamplerConfig) -> StepTable:
    """The step table of a model, float32 on its device.

    Raises:
        ValueError: what `step_table` refuses; or it did not read `noisy_steps`, as that of a model of somebody else's.
    """
    table = model.step_table(config).to(model.device)
    if config.noisy_steps is not None:
        start, length = config.noisy_steps
        if bool((torch.cat([table.sigma[:start], table.sigma[start + length :]]) > 0).any()):
            raise ValueError(
                f"noisy_steps={config.noisy_steps!r} is not read by step_table of model={model.name!r}, whose other "
                "steps are noisy too; combine its tables with diffusion_gym.scheduling.windowed"
            )
    return table


def null_embedding(model: DenoisingModel) -> torch.Tensor:
    """The text embedding `(1, L, D)` that guidance pushes away from."""
    embed_null = getattr(model, "embed_null", None)
    return model.embed(model.tokenize([""])) if embed_null is None else embed_null()


class ModelLoader(Protocol):
    """Loads a model; heavy imports belong inside."""

    def __call__(self, *, device: torch.device, dtype: torch.dtype, **options: str) -> DenoisingModel:
        """Load the model to a device.

        Args:
            device: where its weights go.
            dtype: type of its weights.
            **options: `revision` and `variant` where the user gives them; a loader without files may do without.
        """
        ...


class ModelRegistry(Registry[ModelLoader]):
    """Model loaders by name, with what each model's pictures are; a reward names the traits that it needs."""

    def __init__(self) -> None:
        super().__init__("model")
        self._traits: dict[str, frozenset[str]] = {}

    def register(self, name: str, *, traits: Collection[str] = ()) -> Callable[[U], U]:
        """Decorate a loader to enter it as `name`.

        Args:
            name: the model's name, which becomes a part of environment ids.
            traits: what its pictures are: `prompt` where they follow a prompt, `photo` where they look like
                photographs, `face` where they can show a face, `shapes` where they are of the embedded model's kind.

        Raises:
            ValueError: `name` is taken.
        """
        enter = super().register(name)
        self._traits[name] = frozenset(traits)
        return enter

    def traits(self, name: str) -> frozenset[str]:
        """What the pictures of model `name` are."""
        return self._traits[name]


MODELS = ModelRegistry()
FAMILIES: Registry[Any] = Registry("pipeline")  # classes that load a directory, by the pipeline in its model_index.json
