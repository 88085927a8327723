"""Stable Diffusion 3: a flow-matching transformer with three text encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import nn
from torch.nn.functional import pad
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from diffusion_gym.config import SamplerConfig
from diffusion_gym.flow_samplers import FLOW_SAMPLERS
from diffusion_gym.hub import located_file
from diffusion_gym.models.checkpoint import Checkpoint, token_limit
from diffusion_gym.models.fields import PLAIN_INDEX, SD3_VAE, Allowed
from diffusion_gym.models.latent import LatentModel, pack_pooled, unpack_pooled
from diffusion_gym.models.quiet import quiet
from diffusion_gym.models.repeated_token import RepeatedTokenAttention
from diffusion_gym.models.saving import export_adapters
from diffusion_gym.models.schedulers import flow_scheduler
from diffusion_gym.scheduling import StepTable, flow_table, windowed
from diffusion_gym.storage import read_json

_T5_TOKENS = 256  # what diffusers' pipeline gives the T5 encoder


def flow_step_table(scheduler_config: Mapping[str, Any], config: SamplerConfig, tokens: int) -> StepTable:
    """Step table of a flow-matching scheduler config, float64; `eta` of the sampler is the noise level, `ddim` its SDE.

    Args:
        scheduler_config: of diffusers' `FlowMatchEulerDiscreteScheduler`.
        config: the sampler.
        tokens: patches of a latent, by which a scheduler with dynamic shifting moves its timesteps.

    Raises:
        ValueError: an ancestral sampler, or more steps than the schedule keeps apart.
    """
    sampler = "flow_sde" if config.sampler == "ddim" else config.sampler
    if sampler not in FLOW_SAMPLERS:
        raise ValueError(
            f"sampler={config.sampler!r} is no sampler of a flow-matching model; use one of {', '.join(FLOW_SAMPLERS)}"
        )
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler_config)
    total, steps = scheduler.config.num_train_timesteps, config.num_inference_steps
    if steps > total:
        raise ValueError(f"num_inference_steps={steps} is larger than the model's schedule; use at most {total}")
    scheduler.set_timesteps(steps, mu=_shift(scheduler.config, tokens))
    make = partial(flow_table, scheduler.sigmas.double(), num_train_timesteps=total, sampler=sampler)
    noisy = make(noise_level=config.eta, sigma_min=config.sigma_min)
    return noisy if config.noisy_steps is None else windowed(noisy, make(noise_level=0.0), config.noisy_steps)


def _shift(config: Any, tokens: int) -> float | None:
    """Dynamic shift of the timesteps, linear in the number of patches, as in diffusers' pipeline."""
    if not config.use_dynamic_shifting:
        return None
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return config.base_shift + slope * (tokens - config.base_image_seq_len)


def _repeats(network: Any) -> bool:
    """Whether a transformer takes its last context token for many."""
    return isinstance(network.transformer_blocks[0].attn.processor, RepeatedTokenAttention)


def _has_t5(index: Mapping[str, Any]) -> bool:
    return (index.get("text_encoder_3") or (None, None))[1] is not None


class SD3Model(LatentModel):
    """A `StableDiffusion3Pipeline` directory or hub id; arguments and errors as `LatentModel`.

    Prompts are the token ids of all tokenizers side by side. Their embedding is the two CLIP encoders' of each token,
    after it T5's, and in a last row the pooled one. A pipeline saved with `text_encoder_3=None` goes without T5, and so
    does one whose T5 has embeddings of zeros only. Diffusers' 256 tokens of zeros are then one that counts 256 times,
    which is the same (`RepeatedTokenAttention`). The sampler's defaults are those of Flow-GRPO's training
    (arXiv:2505.05470).
    """

    PARTS: ClassVar[tuple[str, ...]] = (
        "transformer",
        "vae",
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
        "scheduler",
    )
    FIELDS: ClassVar[Mapping[str, Allowed]] = {"vae": SD3_VAE}
    INDEX: ClassVar[Allowed] = PLAIN_INDEX
    SAMPLER_DEFAULTS: ClassVar[Mapping[str, Any]] = {"num_inference_steps": 10, "guidance_scale": 4.5, "eta": 0.7}

    def _parts(self, source: str, revision: str | None) -> Sequence[str]:
        index = located_file(source, "model_index.json", argument="model", revision=revision)
        return [*self.PARTS, *(("text_encoder_3", "tokenizer_3") if _has_t5(read_json(index)) else ())]

    def _scheduler(self, config: Mapping[str, Any]) -> Any:
        return flow_scheduler(self.name, config)

    def _load(self, checkpoint: Checkpoint) -> None:
        # The trained network is called `unet` in `DenoisingModel`; here it is a transformer.
        self.unet = checkpoint.network(SD3Transformer2DModel, "transformer")
        self.vae = checkpoint.network(AutoencoderKL, "vae")
        self.text_encoder = checkpoint.network(CLIPTextModelWithProjection, "text_encoder")
        self.text_encoder_2 = checkpoint.network(CLIPTextModelWithProjection, "text_encoder_2")
        self.tokenizer = checkpoint.tokenizer(CLIPTokenizer, "tokenizer")
        self.tokenizer_2 = checkpoint.tokenizer(CLIPTokenizer, "tokenizer_2")
        limit = token_limit(self.tokenizer, self.text_encoder, self.name)  # diffusers' for both
        self.tokenizers = [(each, limit) for each in (self.tokenizer, self.tokenizer_2)]
        self.text_encoder_3: Any = None
        self.tokenizer_3: Any = None
        if _has_t5(checkpoint.index):
            self.text_encoder_3 = checkpoint.network(T5EncoderModel, "text_encoder_3")
            self.tokenizer_3 = checkpoint.tokenizer(T5TokenizerFast, "tokenizer_3")
        self.has_t5 = self.text_encoder_3 is not None and bool(self.text_encoder_3.shared.weight.any())
        if self.has_t5:
            self.tokenizers.append((self.tokenizer_3, _T5_TOKENS))
        else:  # T5 has no biases: from zeros it makes zeros
            transformer: Any = self.unet
            transformer.set_attn_processor(RepeatedTokenAttention(_T5_TOKENS))

    def step_table(self, config: SamplerConfig) -> StepTable:
        """Coefficients of the T steps of `config`, float64 on the CPU; see `flow_step_table`."""
        return flow_step_table(self.scheduler_config, config, self._patches)

    def timestep_arguments(self, steps: int) -> dict[str, Any]:
        """What the pipeline tells a scheduler besides the number of steps."""
        shift = _shift(FlowMatchEulerDiscreteScheduler.from_config(self.scheduler_config).config, self._patches)
        return {} if shift is None else {"mu": shift}

    @property
    def _patches(self) -> int:
        network: Any = self.unet.config
        return int(network.sample_size // network.patch_size) ** 2

    @torch.no_grad()
    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states of the encoders, packed with the pooled outputs of the two CLIP ones: `(N, rows, D)`."""
        first, second, *third = self.token_ids(tokens)
        one = self.text_encoder(first, output_hidden_states=True)
        two = self.text_encoder_2(second, output_hidden_states=True)
        clip = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
        config: Any = self.unet.config
        width: int = config.joint_attention_dim
        t5 = self.text_encoder_3(*third)[0].to(clip.dtype) if third else clip.new_zeros(len(clip), 1, width)
        hidden = torch.cat([pad(clip, (0, width - clip.shape[-1])), t5], dim=1)
        return pack_pooled(hidden, torch.cat([one.text_embeds, two.text_embeds], dim=-1))

    def predict(
        self,
        unet: nn.Module,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        embeddings: torch.Tensor | None,
        *,
        guidance_scale: float = 1.0,
    ) -> torch.Tensor:
        """Velocity `(N, C, H, W)` that `unet` predicts, in the dtype of the weights; see `DenoisingModel.predict`."""
        assert embeddings is not None
        config: Any = self.unet.config
        hidden, pooled = unpack_pooled(embeddings, config.pooled_projection_dim)
        if not self.has_t5 and not _repeats(unet):  # a network of somebody else's, which is to see all zeros
            hidden = torch.cat([hidden, hidden[:, -1:].expand(-1, _T5_TOKENS - 1, -1)], dim=1)
        return unet(
            hidden_states=latents.to(self.dtype),
            timestep=timesteps,
            encoder_hidden_states=hidden,
            pooled_projections=pooled,
            return_dict=False,
        )[0]

    def _unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the autoencoder made them: shifted as well as scaled."""
        return super()._unscaled(latents) + (self.vae.config.get("shift_factor") or 0.0)

    def _pipeline(self, unet: nn.Module, scheduler: Any) -> Any:
        """Diffusers' pipeline of the model's parts with `unet` as its transformer."""
        from diffusers import StableDiffusion3Pipeline

        return StableDiffusion3Pipeline(
            transformer=unet,
            scheduler=scheduler,
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            text_encoder_2=self.text_encoder_2,
            tokenizer_2=self.tokenizer_2,
            text_encoder_3=self.text_encoder_3,
            tokenizer_3=self.tokenizer_3,
        )

    def save_lora(self, folder: str | Path, unet: nn.Module) -> None:
        """Write the adapters of `unet` so that `StableDiffusion3Pipeline.load_lora_weights` reads them."""
        with quiet():
            from diffusers import StableDiffusion3Pipeline

        export_adapters(folder, StableDiffusion3Pipeline, "transformer", unet)
