"""The policy pi_theta(x_{t-1} | x_t, t, c) = N(mu_theta, sigma_t^2 I): a classifier-free-guided UNet."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffusion_gym.agents.denoising_env import denoising_env
from diffusion_gym.agents.distribution import DenoisingDistribution
from diffusion_gym.agents.embeddings import EmbeddingCache, TextEmbeddings
from diffusion_gym.agents.policy_options import PolicyOptions, Precision, ShardedNetwork, Trainable, require_whole
from diffusion_gym.agents.reference import bring_back, keep_shared, set_aside
from diffusion_gym.config import SamplerConfig
from diffusion_gym.models import ATTENTION, DenoisingModel, null_embedding, sampling_table
from diffusion_gym.scheduling import TERMINAL, guide, predict_x0, step_gaussian

_COMPUTE = {"bf16": torch.bfloat16, "fp16": torch.float16}


class DenoisingPolicy(nn.Module):
    """A trainable copy of a model's UNet, read as a Gaussian policy.

    It stays in eval mode: what is scored in training is what was sampled in the rollout.

    Args:
        model: the pretrained model.
        config: the sampler; the same object as the environment's.
        trainable: `lora`, low-rank adapters on shared weights; or `full`, a copy of all weights.
        lora_rank: rank of the adapters.
        lora_alpha: what an adapter adds is alpha / rank times its product; the rank by default.
        lora_targets: the linear layers that get adapters, by the ends of their names; the model's own by default.

    Attributes:
        unet: the network that trains; `parameters()` of the policy are its parameters.
        table: the step table, float32 on the model's device.
        embeddings: of the prompts, the last ones on the host, up to 2 GiB.
        cfg_training: whether gradients flow through both branches of the guided prediction; without it the
            unconditional branch is held fixed (the ablation of DDPO, appendix G.1). Set by `set_training`.
        mixed_precision: what the UNet computes in, `no` for the type of its weights. Set by `set_training`.
    """

    def __init__(
        self,
        model: DenoisingModel,
        config: SamplerConfig,
        *,
        trainable: Trainable = PolicyOptions.trainable,
        lora_rank: int = PolicyOptions.lora_rank,
        lora_alpha: float | None = None,
        lora_targets: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        from diffusion_gym.models.lora import full_copy, with_lora

        given = None if lora_targets is None else tuple(lora_targets)
        PolicyOptions(trainable, lora_rank, lora_alpha, given)  # checks them
        if trainable == "full" and model.dtype != torch.float32:
            kind = str(model.dtype).removeprefix("torch.")
            raise ValueError(
                f"trainable='full' would lose its updates in dtype={kind!r}; use dtype='float32' with "
                "mixed_precision='bf16', or LoRA"
            )
        require_whole(model)
        self.model, self.config, self.trainable, self.lora_rank = model, config, trainable, lora_rank
        self.sharded: ShardedNetwork | None = None
        self.cfg_training: bool = PolicyOptions.cfg_training
        self.mixed_precision: Precision = PolicyOptions.mixed_precision
        bring_back(model.unet, model.device)  # another policy may have set it aside
        if trainable == "lora":
            keep_shared(model.unet)
            usual: Collection[str] = getattr(model, "lora_targets", ATTENTION)
            targets = usual if given is None else given
            self.unet = with_lora(model.unet, lora_rank, lora_alpha, targets, given=given is not None)
        else:
            self.unet = full_copy(model.unet)
            self.set_reference_aside()
        self.table = sampling_table(model, config)
        self._guide: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor] = getattr(model, "guide", guide)
        self.embeddings = EmbeddingCache(model)
        self._null: torch.Tensor | None = None
        # A network that takes w itself predicts what is guided already; its own keyword, which no other model has.
        self._scale_argument = (
            {"guidance_scale": config.guidance_scale} if getattr(model, "embeds_guidance", False) else {}
        )
        self.eval()

    @classmethod
    def from_env(
        cls,
        env: Any,
        trainable: Trainable = PolicyOptions.trainable,
        lora_rank: int = PolicyOptions.lora_rank,
        lora_alpha: float | None = None,
        lora_targets: Sequence[str] | None = None,
        **training: Any,
    ) -> DenoisingPolicy:
        """The policy of an environment's model and sampler.

        Args:
            env: a denoising environment, single or vectorised, wrapped or not, or adapted to a library.
            trainable: `lora` or `full`.
            lora_rank: rank of the adapters.
            lora_alpha: their alpha.
            lora_targets: their layers.
            **training: of `set_training`.

        Raises:
            ValueError: `env` is no denoising environment, or an option cannot be had.
        """
        base = denoising_env(env)
        adapters: dict[str, Any] = {"lora_rank": lora_rank, "lora_alpha": lora_alpha, "lora_targets": lora_targets}
        policy = cls(base.model, base.sampler_config, trainable=trainable, **adapters)
        if training:
            policy.set_training(**training)
        return policy

    def set_training(
        self,
        *,
        cfg_training: bool = PolicyOptions.cfg_training,
        mixed_precision: Precision = PolicyOptions.mixed_precision,
        gradient_checkpointing: bool = PolicyOptions.gradient_checkpointing,
    ) -> None:
        """Choose how the network computes; an agent does this from its options.

        Args:
            cfg_training: let gradients flow through both branches of the guided prediction; without it the
                unconditional branch is held fixed (the ablation of DDPO, appendix G.1).
            mixed_precision: `bf16` or `fp16` runs the UNet under autocast, in rollouts and in training alike; latents,
                step maths and log-probabilities stay float32. `no` computes in the type of the weights.
            gradient_checkpointing: recompute activations in the backward pass: less memory, more time.

        Raises:
            ValueError: an unknown precision, or one that does not go with the weights' own; a network that cannot
                checkpoint. Nothing has changed then.
        """
        PolicyOptions(mixed_precision=mixed_precision)  # checks it
        compute, stored = _COMPUTE.get(mixed_precision), self.model.dtype
        if compute is not None and stored not in (compute, torch.float32):
            kind = str(stored).removeprefix("torch.")
            raise ValueError(
                f"mixed_precision={mixed_precision!r} does not go with weights of dtype={kind!r}; leave "
                "mixed_precision at 'no', or use dtype='float32'"
            )
        if gradient_checkpointing and not hasattr(self.unet, "enable_gradient_checkpointing"):
            raise ValueError(
                "gradient_checkpointing=True needs a network that can do it, as those of diffusers can; "
                f"{type(self.unet).__name__} has no enable_gradient_checkpointing"
            )
        self.cfg_training, self.mixed_precision = cfg_training, mixed_precision
        if hasattr(self.unet, "enable_gradient_checkpointing"):
            switch = "enable" if gradient_checkpointing else "disable"
            getattr(self.unet, f"{switch}_gradient_checkpointing")()

    def begin_from(self, path: str | Path) -> None:
        """Begin from exported weights: adapters, or where all weights train a pipeline's network as well.

        The reference stays the pretrained model. Paths and errors as in `diffusion_gym.models.initial.begin_from`.
        """
        from diffusion_gym.models.initial import begin_from

        rank = self.lora_rank if self.trainable == "lora" else None
        begin_from(path, self.unet, rank, self.table.prediction, getattr(self.model, "scheduler_config", None))

    @property
    def reference_network(self) -> nn.Module:
        """The pretrained network."""
        return self.model.unet if self.sharded is None else self.sharded.reference

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.model.device

    @contextmanager
    def noisy_within(self, noisy_steps: tuple[int, int]) -> Iterator[None]:
        """Within this context these steps are the noisy ones, the first and how many, in place of the sampler's own."""
        own, self.table = self.table, sampling_table(self.model, replace(self.config, noisy_steps=noisy_steps))
        try:
            yield
        finally:
            self.table = own

    @property
    def stochastic_steps(self) -> torch.Tensor:
        """The steps with sigma > 0, int64: those that a policy gradient can use."""
        return (self.table.sigma > 0).nonzero().flatten().cpu()

    def require_noise(self) -> None:
        """Refuse a sampler without a stochastic step, for which there is no policy gradient.

        Raises:
            ValueError: what makes all steps deterministic, and the remedy.
        """
        if len(self.stochastic_steps):
            return
        if self.config.eta == 0 and self.config.sampler != "ddpm":
            why, remedy = f"eta={self.config.eta}", "eta=1 (ancestral sampling; of a flow about 0.7)"
        elif self.config.noisy_steps is not None:
            why, remedy = f"noisy_steps={self.config.noisy_steps}", "a window that begins before the last step"
        else:  # the last step has no noise, whatever eta is
            why, remedy = f"num_inference_steps={self.config.num_inference_steps}", "more steps"
        raise ValueError(
            f"{why} makes every denoising step deterministic, so that a policy gradient does not exist; use {remedy} "
            "or sigma_min > 0"
        )

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by name."""
        return {name: parameter for name, parameter in self.unet.named_parameters() if parameter.requires_grad}

    def set_reference_aside(self) -> None:
        """On a GPU free the memory of the pretrained model's network until it is asked for, where all weights train."""
        if self.trainable == "full":
            set_aside(self.model)

    def train(self, mode: bool = True) -> DenoisingPolicy:
        """Stay in eval mode, whatever `mode` says: dropout would break ratio = 1."""
        return super().train(False)

    def observation(self, latents: torch.Tensor, step: int, tokens: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """The observation of states at one step, for sampling without an environment.

        Args:
            latents: x_t, float32 `(N, C, H, W)`.
            step: 0 is the first, noisiest one.
            tokens: token ids `(N, L)`; None for an unconditional model.
        """
        timestep = self.table.timesteps[step].expand(len(latents), 1)
        states = {"timestep": timestep, "latents": latents, "step": torch.full_like(timestep[:, 0], step)}
        return states if tokens is None else {"prompt": tokens, **states}

    def distribution(self, observation: Mapping[str, Any]) -> DenoisingDistribution:
        """The Gaussian over x_{t-1}, for any mix of timesteps in one call.

        Args:
            observation: `prompt` int64 `(N, L)`, `timestep` int64 `(N, 1)`, `latents` float32 `(N, C, H, W)`;
                tensors or NumPy arrays. That of a single environment, without the N, is a batch of one. Two things may
                come with them, which saves waiting for a GPU: `embedding`, the prompts' text embeddings `(N, L, D)` as
                `embed_prompts` gives them, and `step`, int64 `(N,)`, in place of looking the timesteps up.

        Raises:
            ValueError: a timestep that the sampler does not visit, such as that of a finished episode.
        """
        return self._distribution(self.unet, observation)

    @torch.no_grad()
    def reference_distribution(self, observation: Mapping[str, Any]) -> DenoisingDistribution:
        """The pretrained model's Gaussian for the same states; under LoRA its weights are those of the policy."""
        return self._distribution(self.reference_network, observation)

    def forward(self, observation: Mapping[str, Any], action: torch.Tensor) -> torch.Tensor:
        """Log-probabilities `(N,)` of actions `(N, C, H, W)`: the path of training, which DDP wraps."""
        return self.distribution(observation).log_prob(action)

    def prediction(self, observation: Mapping[str, Any], *, reference: bool = False) -> torch.Tensor:
        """What the network predicts of x_t, guided, `(N, C, H, W)`: noise, x_0 or velocity, as its model defines it.

        Without `cfg_training` it is the conditional prediction alone (DDPO, figure 8).

        Args:
            observation: as in `distribution`.
            reference: of the pretrained model, without gradient.
        """
        latents, steps = self._read(observation)
        embeddings = self.embeddings_of(observation)
        unet = self.reference_network if reference else self.unet
        predict = self._guided_output if self.cfg_training else self._predict
        with torch.set_grad_enabled(torch.is_grad_enabled() and not reference):
            return predict(unet, latents, steps, embeddings)

    def estimates(self, output: torch.Tensor, observation: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """The x_0 and the noise that predictions of states stand for, each `(N, C, H, W)`; x_0 is not clamped."""
        return self._estimates(output, *self._read(observation))

    def predicted_noise(self, observation: Mapping[str, Any]) -> torch.Tensor:
        """The noise in x_t that `prediction` stands for, `(N, C, H, W)`: what reward-weighted regression fits."""
        return self.estimates(self.prediction(observation), observation)[1]

    @torch.no_grad()
    def output_at(
        self, latents: torch.Tensor, timestep: torch.Tensor, embeddings: torch.Tensor | None, *, reference: bool = False
    ) -> torch.Tensor:
        """The guided output of the network (or of the pretrained one) at a timestep that the sampler need not visit."""
        unet = self.reference_network if reference else self.unet
        timesteps = timestep.to(self.device, torch.float32).expand(len(latents))
        return self._guided_output(unet, latents, timesteps, embeddings)

    def denoised(self, observation: Mapping[str, Any]) -> torch.Tensor:
        """The denoised estimate x0~ of x_t `(N, C, H, W)` (thesis, equation 4.5), clamped where the sampler clamps it.

        Observations as in `distribution`.
        """
        latents, steps = self._read(observation)
        output = self._guided_output(self.unet, latents, steps, self.embeddings_of(observation))
        x0, bound = self._estimates(output, latents, steps)[0], self.table.clip_x0
        return x0 if bound is None else x0.clamp(-bound, bound)

    def _estimates(
        self, output: torch.Tensor, latents: torch.Tensor, steps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The x0 and the noise that a network's output stands for, each `(N, C, H, W)`."""
        signal, noise = (column[steps].view(-1, 1, 1, 1) for column in (self.table.signal, self.table.noise))
        return predict_x0(output, latents, signal, noise, self.table.prediction)

    def _distribution(self, unet: nn.Module, observation: Mapping[str, Any]) -> DenoisingDistribution:
        latents, steps = self._read(observation)
        output = self._guided_output(unet, latents, steps, self.embeddings_of(observation))
        mean, std = step_gaussian(self.table, steps, latents, output)
        return DenoisingDistribution(mean, std, self.config.log_prob_reduction)

    def _read(self, observation: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents `(N, C, H, W)` and the steps `(N,)` at which the sampler visits their timesteps."""
        latents = torch.as_tensor(observation["latents"], device=self.device)
        latents = latents[None] if latents.ndim == 3 else latents
        if (given := observation.get("step")) is not None:
            return latents, torch.as_tensor(given, device=self.device)
        timesteps = torch.as_tensor(observation["timestep"], device=self.device).reshape(-1)
        if timesteps.is_floating_point():
            raise ValueError(
                f"observation['timestep'] is {timesteps.dtype}: something normalises observations, which the network "
                "must see as they are; take it off (VecNormalize: norm_obs=False)"
            )
        last = len(self.table.step_of) - 1
        steps = self.table.step_of[timesteps.clamp(0, last)]
        visited = (steps >= 0) & (timesteps >= 0) & (timesteps <= last)  # negative ones would count from the end
        if not bool(visited.all()):
            strange = sorted(set(timesteps[~visited].tolist()))
            raise ValueError(
                f"observation['timestep'] holds {strange}; the sampler visits {self.table.timesteps.tolist()}"
                + (f", and {TERMINAL} is that of x_0: the episode is over" if TERMINAL in strange else "")
            )
        return latents, steps

    def _guided_output(
        self, unet: nn.Module, latents: torch.Tensor, steps: torch.Tensor, conditional: torch.Tensor | None
    ) -> torch.Tensor:
        """One guided prediction, the same in rollout and in training (CFG training, DDPO appendix G.1)."""
        if conditional is None or self.config.guidance_scale == 1 or self._scale_argument:
            return self._predict(unet, latents, steps, conditional)
        if self._null is None:
            self._null = null_embedding(self.model)
        null = self._null.expand_as(conditional)
        if torch.is_grad_enabled() and not self.cfg_training:
            with torch.no_grad():
                unguided = self._predict(unet, latents, steps, null)
            return self._guide(self._predict(unet, latents, steps, conditional), unguided, self.config.guidance_scale)
        both = torch.cat([conditional, null])
        output = self._predict(unet, torch.cat([latents, latents]), torch.cat([steps, steps]), both)
        guided, unguided = output.chunk(2)
        return self._guide(guided, unguided, self.config.guidance_scale)

    def _predict(
        self, unet: nn.Module, latents: torch.Tensor, steps: torch.Tensor, embeddings: torch.Tensor | None
    ) -> torch.Tensor:
        """The network's output in float32, computed in the precision that was chosen.

        `steps` are the sampler's, int64 `(N,)`; or, floating, timesteps that it need not visit.
        """
        timesteps = steps if steps.is_floating_point() else self.table.network_timesteps[steps]
        compute = _COMPUTE.get(self.mixed_precision)
        with torch.autocast(self.device.type, dtype=compute, enabled=compute is not None):
            return self.model.predict(unet, latents, timesteps, embeddings, **self._scale_argument).float()

    def embeddings_of(self, observation: Mapping[str, Any]) -> torch.Tensor | None:
        """Text embeddings `(N, L, D)` of an observation's prompts; None for an unconditional model."""
        if (given := observation.get("embedding")) is not None:
            return torch.as_tensor(given, device=self.device)
        tokens = observation.get("prompt")
        return None if tokens is None else self.embed(torch.as_tensor(tokens))

    def embed_prompts(self, prompts: Sequence[str]) -> torch.Tensor | None:
        """Text embeddings `(N, L, D)` of N prompts, on the policy's device; None for an unconditional model."""
        found = self.text_embeddings(prompts)
        return None if found is None else found.all()

    def text_embeddings(self, prompts: Sequence[str]) -> TextEmbeddings | None:
        """Those of N prompts, equal ones once; a GPU is waited for only where a prompt is new."""
        if not self.model.prompt_length:
            return None
        distinct = list(dict.fromkeys(prompts))
        rows = dict(zip(distinct, self.model.tokenize(distinct), strict=True))
        return self.embeddings.find(torch.stack([rows[prompt] for prompt in prompts]))

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Text embeddings `(N, L, D)` of token ids `(N, L)` or `(L,)`, on the policy's device."""
        return self.embeddings.find(tokens.reshape(-1, tokens.shape[-1])).all()
