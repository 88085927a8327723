"""The guided UNet as Stable-Baselines3's `ActorCriticPolicy`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import get_device
from torch.utils.checkpoint import checkpoint

from diffusion_gym.agents.identity import Identity, identity, require_fingerprint
from diffusion_gym.agents.policy import DenoisingPolicy, Precision, Trainable
from diffusion_gym.agents.sb3.checks import (
    UnsavedModel,
    checked,
    refuse,
    require_denoising,
    require_spaces_of,
    same_device,
)
from diffusion_gym.agents.sb3.distribution import GuidedGaussian
from diffusion_gym.agents.value import ValueNetwork
from diffusion_gym.config import SamplerConfig
from diffusion_gym.envs.spaces import make_spaces
from diffusion_gym.models import DenoisingModel, load_model
from diffusion_gym.storage import exact_json, load_tensors, parse_json, save_tensors, tensors_metadata

_FORMAT = "diffusion-gym-sb3-policy-1"
# The native agents' defaults; SB3's own are Adam with eps=1e-5 and no weight decay.
_ADAMW = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4}


class _NoFeatures(BaseFeaturesExtractor):
    """SB3 wants a features extractor; the UNet takes the observation as it is."""

    def __init__(self, observation_space: spaces.Space[Any]) -> None:
        super().__init__(observation_space, features_dim=1)

    def forward(self, observations: Any) -> Any:
        return observations


class CFGUNetPolicy(ActorCriticPolicy):
    """SB3's view of a `DenoisingPolicy`: nothing is extracted, scaled, squashed or clipped; sigma_t is the sampler's.

    `policy_kwargs(env)` of `diffusion_gym.agents.sb3` gives the arguments; they are JSON values, so that SB3's `save`
    has no model to pickle. The state dictionary, and with it every file, holds what trains alone.

    Args:
        observation_space: of the denoising environment.
        action_space: of the denoising environment.
        lr_schedule: learning rate by the part of the training that is left, from SB3.
        use_sde: from SB3; must be false.
        model: name, folder or hub id of the environment's model.
        model_kwargs: of the environment: `revision` and `variant`.
        sampler: the environment's `SamplerConfig`, as a mapping.
        fingerprint: of the environment's model, which the one that is loaded must have; None for any.
        dtype: type of the model's weights.
        device: where to load the model; SB3's own `device` has the last word.
        trainable: `lora` or `full`; see `DenoisingPolicy`.
        lora_rank: rank of the adapters.
        value_network: learn V(x_t, t, c) too; without it all values are 0.
        micro_batch_size: transitions that `evaluate_actions` takes through the network at a time. Activations of
            more than one such part are not kept, but computed again in the backward pass, so that memory is bounded in
            SB3's own `train`, at the price of one more forward pass. 0 takes all at once.
        cfg_training: see `DenoisingPolicy.set_training`.
        mixed_precision: `no` or `bf16`; see `DenoisingPolicy.set_training`.
        gradient_checkpointing: see `DenoisingPolicy.set_training`.
        optimizer_class: a class, or its name in `torch.optim`; AdamW by default, as in the native agents.
        optimizer_kwargs: by default those of the native agents where it is AdamW.
        **unused: the other arguments of SB3's policies, which must be off.

    Attributes:
        actor: the `DenoisingPolicy`.
        value_net: the value network, or None.

    Raises:
        ValueError: spaces that are not the model's, or an option that would change actions.
    """

    value_net: ValueNetwork | None  # type: ignore[assignment]

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        use_sde: bool = False,
        *,
        model: str | UnsavedModel | None = None,
        model_kwargs: Mapping[str, str | None] | None = None,
        fingerprint: str | None = None,
        sampler: Mapping[str, Any] | None = None,
        dtype: str = "float32",
        device: str = "auto",
        trainable: Trainable = "lora",
        lora_rank: int = 4,
        value_network: bool = False,
        micro_batch_size: int = 0,
        cfg_training: bool = True,
        mixed_precision: Precision = "no",
        gradient_checkpointing: bool = False,
        optimizer_class: str | type[torch.optim.Optimizer] = "AdamW",
        optimizer_kwargs: dict[str, Any] | None = None,
        **unused: Any,
    ) -> None:
        refuse({"use_sde": use_sde, **unused})
        require_denoising(observation_space)
        if model is None or sampler is None:
            missing = "model" if model is None else "sampler"
            raise ValueError(
                f"policy_kwargs has no {missing!r}; pass policy_kwargs=diffusion_gym.agents.sb3.policy_kwargs(env)"
            )
        if mixed_precision == "fp16" or dtype == "float16":
            raise ValueError(
                f"mixed_precision={mixed_precision!r}, dtype={dtype!r}: float16 gradients need loss scaling, which SB3 "
                "does not do; use bf16 or bfloat16"
            )
        kind: Any = getattr(torch.optim, optimizer_class) if isinstance(optimizer_class, str) else optimizer_class
        default = dict(_ADAMW) if kind is torch.optim.AdamW else {}
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            features_extractor_class=_NoFeatures,
            optimizer_class=kind,
            optimizer_kwargs=default if optimizer_kwargs is None else optimizer_kwargs,
            normalize_images=False,
        )
        self.micro_batch_size = micro_batch_size
        self._source: dict[str, Any] = {"model": model, "model_kwargs": dict(model_kwargs or {}), "dtype": dtype}
        self._options: dict[str, Any] = {"trainable": trainable, "lora_rank": lora_rank}
        self._training_options: dict[str, Any] = {
            "cfg_training": cfg_training,
            "mixed_precision": mixed_precision,
            "gradient_checkpointing": gradient_checkpointing,
        }
        self._config = SamplerConfig(**sampler)
        self._with_values, self._last_timesteps = value_network, None
        self._make(get_device(device), lr_schedule(1))
        require_spaces_of(self.actor.model, observation_space, action_space)
        require_fingerprint(fingerprint, self.identity(), "policy_kwargs")

    def _build(self, lr_schedule: Schedule) -> None:
        """SB3 makes its networks here; `_make` makes ours once the options are known."""

    def _make(self, device: torch.device, learning_rate: float) -> None:
        """The networks on a device, and their optimiser."""
        source = self._source["model"]
        named = source if isinstance(source, str) else source.model
        options = self._source["model_kwargs"] if isinstance(named, str) else None
        model = load_model(named, device, self._source["dtype"], options)
        if not same_device(model.device, device):
            raise ValueError(
                f"device={str(device)!r}: policy_kwargs['model'] is an object on {model.device}; pass "
                f"device={str(model.device)!r}"
            )
        self.actor = DenoisingPolicy(model, self._config, **self._options)
        self.actor.require_noise()
        self.actor.set_training(**self._training_options)
        self.value_net = None
        if self._with_values:
            features = self.actor.embed(model.tokenize([""])).shape[-1] if model.prompt_length else 0
            self.value_net = ValueNetwork(model.latent_shape[0], features, model.num_train_timesteps).to(device)
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        self.optimizer = self.optimizer_class(trained, lr=learning_rate, **self.optimizer_kwargs)  # type: ignore[call-arg]

    @property
    def horizon(self) -> int:
        """T, the number of steps of an episode."""
        return len(self.actor.table)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.actor.device

    def identity(self) -> Identity:
        """Model and sampler, as `diffusion_gym.agents.identity` compares them."""
        return identity(self.actor.model, self._source["model_kwargs"], self._config)

    def to(self, device: torch.device | str) -> Self:  # type: ignore[override]
        """This policy on another device, for which the model is loaded there; the environment's own stays."""
        if not same_device(torch.device(device), self.device):
            weights, rate = self.state_dict(), self.optimizer.param_groups[0]["lr"]
            self._make(torch.device(device), rate)
            self.load_state_dict(weights)
        return self

    # --- acting and scoring --------------------------------------------------------------------------------

    def forward(self, obs: Any, deterministic: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Actions `(N, C, H, W)`, values `(N, 1)` and log-probabilities `(N,)` of N states: SB3's rollout."""
        distribution = self.get_distribution(obs)
        actions = distribution.get_actions(deterministic)
        self._last_timesteps = obs["timestep"]
        return actions, self.predict_values(obs), distribution.log_prob(actions)

    def get_distribution(self, obs: Any) -> GuidedGaussian:
        """The Gaussian over x_{t-1}."""
        return GuidedGaussian(self.actor.distribution(checked(obs)))

    def evaluate_actions(self, obs: Any, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Values `(N, 1)`, log-probabilities `(N,)` and entropies `(N,)` of actions taken earlier."""
        size = self.micro_batch_size
        if not size or len(actions) <= size:
            return self._evaluate(obs, actions)
        parts = []
        for start in range(0, len(actions), size):
            rows = slice(start, start + size)
            part = {key: value[rows] for key, value in obs.items()}
            parts.append(checkpoint(self._evaluate, part, actions[rows], use_reentrant=False))
        values, log_probs, entropies = (torch.cat(column) for column in zip(*parts, strict=True))
        return values, log_probs, entropies

    def _evaluate(self, obs: Any, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        distribution = self.get_distribution(obs)
        return self.predict_values(obs), distribution.log_prob(actions), distribution.entropy()

    def predict_values(self, obs: Any) -> torch.Tensor:
        """V(x_t, t, c), `(N, 1)`; zeros without a value network."""
        latents = obs["latents"]
        if self.value_net is None:
            return torch.zeros(len(latents), 1, device=self.device)
        tokens = obs.get("prompt")
        embeddings = None if tokens is None else self.actor.embed(tokens)
        return self.value_net(latents, obs["timestep"].reshape(-1), embeddings)[:, None]

    def extract_features(self, obs: Any, features_extractor: Any = None) -> Any:
        """The observation as it is."""
        return obs

    def obs_to_tensor(self, observation: Any) -> tuple[dict[str, torch.Tensor], bool]:
        """Observations, of one state or N, NumPy or torch, as tensors of N states, and whether it was N."""
        tensors = {key: torch.as_tensor(value, device=self.device) for key, value in observation.items()}
        batched = tensors["latents"].ndim > len(self.action_space.shape or ())
        return (tensors if batched else {key: value[None] for key, value in tensors.items()}), batched

    def set_training_mode(self, mode: bool) -> None:
        """Stay in eval mode; when SB3 begins to train, check that its rollout ended with an episode.

        Raises:
            ValueError: it did not, and there is no value network to stand for the reward that is still to come.
        """
        if mode:
            last, self._last_timesteps = self._last_timesteps, None
            if last is not None and self.value_net is None:
                self._require_ended(torch.as_tensor(last, device=self.device))
        super().set_training_mode(mode)

    def _require_ended(self, timesteps: torch.Tensor) -> None:
        if bool((timesteps != self.actor.table.timesteps[-1]).any()):
            raise ValueError(
                f"n_steps must be a multiple of T={self.horizon}: the rollout ended within an episode, whose reward is "
                f"not known yet; use n_steps={self.horizon}, or a value network (policy_kwargs value_network=True)"
            )

    # --- weights -------------------------------------------------------------------------------------------

    def trained_names(self) -> list[str]:
        """Names of the parameters that train."""
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """What trains: adapters or the UNet, and the value network; not the model that it is trained from."""
        everything, prefix = super().state_dict(*args, **kwargs), kwargs.get("prefix", "")
        return {prefix + name: everything[prefix + name] for name in self.trained_names()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Put back what `state_dict` gave.

        Raises:
            RuntimeError: with `strict`, where the names or shapes are those of another policy.
        """
        if strict and set(state_dict) != set(self.trained_names()):
            raise RuntimeError(
                "the weights are those of another policy; check the model, trainable, lora_rank and value_network"
            )
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            **{"observation_space": self.observation_space, "action_space": self.action_space},
            **{"lr_schedule": self._dummy_schedule, **self.arguments()},
        }

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that make this policy again: JSON values, but for what has no name."""
        kind: Any = self.optimizer_class
        named = getattr(torch.optim, kind.__name__, None) is kind
        return {
            **{**self._source, **self._options, **self._training_options},
            **{"sampler": dict(vars(self._config)), "fingerprint": self.identity()["fingerprint"]},
            **{"value_network": self._with_values},
            **{"micro_batch_size": self.micro_batch_size},
            **{"optimizer_class": kind.__name__ if named else kind, "optimizer_kwargs": self.optimizer_kwargs},
        }

    def save(self, path: str | Path) -> None:
        """Write what trains as one safetensors file, the arguments as JSON in its header; no pickle.

        The optimiser is not in it.
        """
        arguments = {name: value for name, value in self.arguments().items() if not name.startswith("optimizer")}
        if isinstance(arguments["model"], UnsavedModel):
            arguments["model"] = None
        save_tensors(path, self.state_dict(), {"format": _FORMAT, "arguments": exact_json(arguments)})

    @classmethod
    def load(  # type: ignore[override]
        cls, path: str | Path, device: torch.device | str = "auto", model: DenoisingModel | None = None
    ) -> Self:
        """The policy that `save` wrote.

        Args:
            path: the file.
            device: where to.
            model: the model, where it was an object without a name.

        Raises:
            ValueError: the file is none of `save`'s, or lacks its model.
        """
        tensors, metadata = load_tensors(path), tensors_metadata(path)
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"path={str(path)!r} is no file of CFGUNetPolicy.save")
        arguments = parse_json(metadata["arguments"])
        if model is not None:
            arguments["model"] = UnsavedModel(model)
        if arguments["model"] is None:
            raise ValueError(f"path={str(path)!r} was saved with a model object; pass it: load(path, model=...)")
        place = get_device(device)
        known = model or load_model(arguments["model"], place, arguments["dtype"], arguments.get("model_kwargs"))
        policy = cls(*make_spaces(known), lr_schedule=cls._dummy_schedule, device=str(place), **arguments)
        policy.load_state_dict(tensors)
        return policy
