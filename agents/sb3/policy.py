"""The guided UNet as Stable-Baselines3's `ActorCriticPolicy`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Self

import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import get_device

from diffusion_gym.agents.adapters import (
    load_learned,
    made_policy,
    policy_options,
    require_micro_batch_size,
    require_spaces,
    save_learned,
    to_tensors,
)
from diffusion_gym.agents.distribution import DenoisingDistribution
from diffusion_gym.agents.identity import Identity, identity, require_fingerprint
from diffusion_gym.agents.optimization import OptimizerOptions, recomputed
from diffusion_gym.agents.policy_options import PolicyOptions
from diffusion_gym.agents.value import ValueNetwork
from diffusion_gym.config import SamplerConfig
from diffusion_gym.devices import numbered
from diffusion_gym.envs.spaces import make_spaces
from diffusion_gym.models import DenoisingModel, load_model

_FORMAT = "diffusion-gym-sb3-policy-1"
_OWN = ("value_network", "micro_batch_size", "optimizer_class", "optimizer_kwargs", "device")
OPTIONS = [*(entry.name for entry in fields(PolicyOptions)), *_OWN]


class UnsavedModel:
    """A model object that has no name to load it by: SB3's `save` refuses it instead of pickling its weights.

    Args:
        model: the model.
    """

    def __init__(self, model: DenoisingModel) -> None:
        self.model = model

    def __reduce__(self) -> Any:
        raise TypeError(
            f"policy_kwargs['model']={self.model.name!r} was given as an object, which is not pickled; make the "
            "environment with the model's name or folder, or save model.policy.save(path) alone"
        )


class CFGUNetPolicy(ActorCriticPolicy):
    """SB3's view of a `DenoisingPolicy`: nothing is extracted, scaled, squashed or clipped; sigma_t is the sampler's.

    `policy_kwargs(env)` of `diffusion_gym.agents.sb3` gives the arguments; they are JSON values, so that SB3's `save`
    has no model to pickle. The state dictionary, and with it every file, holds what trains alone.

    Args:
        observation_space: of the denoising environment.
        action_space: of the denoising environment.
        lr_schedule: learning rate by the part of the training that is left, from SB3.
        model: name, folder or hub id of the environment's model.
        model_kwargs: of the environment: `revision` and `variant`.
        sampler: the environment's `SamplerConfig`, as a mapping.
        fingerprint: of the environment's model, which the one that is loaded must have; None for any.
        dtype: type of the model's weights.
        device: where to load the model; SB3's own `device` has the last word.
        value_network: learn V(x_t, t, c) too; without it all values are 0.
        micro_batch_size: transitions that `evaluate_actions` takes through the network at a time, so that memory is
            bounded in SB3's own `train`; see `recomputed`. 0 takes all at once.
        optimizer_class: a class, or its name in `torch.optim`; AdamW by default, as in the native agents.
        optimizer_kwargs: by default those of the native agents where it is AdamW.
        **options: those of `PolicyOptions`; and the other arguments of SB3's policies, which must be off.

    Attributes:
        actor: the `DenoisingPolicy`.
        value_net: the value network, or None.
        options: of the actor.

    Raises:
        ValueError: spaces that are not the model's, an option that would change actions, or one out of its range.
    """

    value_net: ValueNetwork | None  # type: ignore[assignment]

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        *,
        model: str | UnsavedModel | None = None,
        model_kwargs: Mapping[str, str | None] | None = None,
        fingerprint: str | None = None,
        sampler: Mapping[str, Any] | None = None,
        dtype: str = "float32",
        device: str = "auto",
        value_network: bool = False,
        micro_batch_size: int = 0,
        optimizer_class: str | type[torch.optim.Optimizer] = "AdamW",
        optimizer_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        require_micro_batch_size(micro_batch_size)
        computing = policy_options(options)
        _refuse(observation_space, {"model": model, "sampler": sampler}, options)
        kind: Any = getattr(torch.optim, optimizer_class) if isinstance(optimizer_class, str) else optimizer_class
        default = OptimizerOptions().adamw if kind is torch.optim.AdamW else {}  # SB3's is Adam with eps=1e-5
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            optimizer_class=kind,
            optimizer_kwargs=default if optimizer_kwargs is None else optimizer_kwargs,
            normalize_images=False,
        )
        self.options, self.micro_batch_size, self._last_timesteps = computing, micro_batch_size, None
        source = {"model": model, "model_kwargs": dict(model_kwargs or {}), "dtype": dtype}
        self._source: dict[str, Any] = {**source, "value_network": value_network}
        self._config = SamplerConfig(**(sampler or {}))
        self._make(get_device(device), lr_schedule(1))
        require_spaces(self.actor.model, observation_space, action_space)
        require_fingerprint(fingerprint, self.identity(), "policy_kwargs")

    def _build(self, lr_schedule: Schedule) -> None:
        """SB3 makes its networks here; `_make` makes ours once the options are known."""

    def _make(self, device: torch.device, learning_rate: float) -> None:
        """The networks on a device, and their optimiser."""
        source = self._source["model"]
        named = source if isinstance(source, str) else source.model
        options = self._source["model_kwargs"] if isinstance(named, str) else None
        model = load_model(named, device, self._source["dtype"], options)
        if numbered(model.device) != numbered(device):
            raise ValueError(
                f"device={str(device)!r}: policy_kwargs['model'] is an object on {model.device}; pass "
                f"device={str(model.device)!r}"
            )
        self.actor = made_policy(model, self._config, self.options, "SB3")
        self.value_net = ValueNetwork.of(self.actor) if self._source["value_network"] else None
        trained = list(self.trained_parameters().values())
        self.optimizer = self.optimizer_class(trained, lr=learning_rate, **self.optimizer_kwargs)  # type: ignore[call-arg]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.actor.device

    def identity(self) -> Identity:
        """Model and sampler, as `diffusion_gym.agents.identity` compares them."""
        return identity(self.actor.model, self._source["model_kwargs"], self._config)

    def to(self, device: torch.device | str) -> Self:  # type: ignore[override]
        """This policy on another device, for which the model is loaded there; the environment's own stays."""
        if numbered(torch.device(device)) != numbered(self.device):
            weights, rate = self.state_dict(), self.optimizer.param_groups[0]["lr"]
            self._make(torch.device(device), rate)
            self.load_state_dict(weights)
        return self

    # --- acting and scoring --------------------------------------------------------------------------------

    def forward(self, obs: Any, deterministic: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Actions `(N, C, H, W)`, values `(N, 1)` and log-probabilities `(N,)` of N states: SB3's rollout."""
        distribution = self.get_distribution(obs)
        actions = distribution.mean if deterministic else distribution.sample()  # SB3 seeds PyTorch's own generator
        self._last_timesteps = obs["timestep"]
        return actions, self.predict_values(obs), distribution.log_prob(actions)

    def _predict(self, observation: Any, deterministic: bool = False) -> torch.Tensor:
        distribution = self.get_distribution(observation)
        return distribution.mean if deterministic else distribution.sample()

    def get_distribution(self, obs: Any) -> DenoisingDistribution:  # type: ignore[override]
        """The Gaussian over x_{t-1}."""
        return self.actor.distribution(obs)

    def evaluate_actions(  # type: ignore[override]
        self, obs: Any, actions: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Values `(N, 1)`, log-probabilities `(N,)` and entropies `(N,)` of actions taken earlier."""
        return recomputed(self._evaluate, self.micro_batch_size, obs, actions)

    def _evaluate(self, obs: Any, actions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        distribution = self.get_distribution(obs)
        log_prob = distribution.log_prob(actions.reshape(distribution.mean.shape))  # SB3's buffers store them flat
        return self.predict_values(obs), log_prob, distribution.entropy()

    def predict_values(self, obs: Any) -> torch.Tensor:
        """V(x_t, t, c), `(N, 1)`; zeros without a value network."""
        if self.value_net is None:
            return torch.zeros(len(obs["latents"]), 1, device=self.device)
        return self.value_net.values(self.actor, obs)[:, None]

    def obs_to_tensor(self, observation: Any) -> tuple[dict[str, torch.Tensor], bool]:
        """Observations, of one state or N, NumPy or torch, as tensors of N states, and whether it was N."""
        tensors = to_tensors(observation, self.device)
        batched = tensors["latents"].ndim > len(self.action_space.shape or ())
        return (tensors if batched else {key: value[None] for key, value in tensors.items()}), batched

    def set_training_mode(self, mode: bool) -> None:
        """Stay in eval mode; when SB3 begins to train, check that its rollout ended with an episode.

        Raises:
            ValueError: it did not, and there is no value network to stand for the reward that is still to come.
        """
        super().set_training_mode(mode)
        last = self._last_timesteps
        if not mode or last is None:
            return
        self._last_timesteps, timesteps = None, self.actor.table.timesteps
        if self.value_net is None and bool((torch.as_tensor(last, device=self.device) != timesteps[-1]).any()):
            raise ValueError(
                f"n_steps must be a multiple of T={len(timesteps)}: the rollout ended within an episode, whose reward "
                f"is not known yet; use n_steps={len(timesteps)}, or a value network (policy_kwargs value_network=True)"
            )

    # --- weights -------------------------------------------------------------------------------------------

    def trained_parameters(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that train, by name: adapters or the UNet, and the value network."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """What trains; not the model that it is trained from."""
        everything, prefix = super().state_dict(*args, **kwargs), kwargs.get("prefix", "")
        return {prefix + name: everything[prefix + name] for name in self.trained_parameters()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Put back what `state_dict` gave.

        Raises:
            RuntimeError: with `strict`, where the names or shapes are those of another policy.
        """
        if strict and set(state_dict) != set(self.trained_parameters()):
            raise RuntimeError(
                "the weights are those of another policy; check the model, trainable, lora_rank and value_network"
            )
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that make this policy again: JSON values, but for what has no name."""
        kind: Any = self.optimizer_class
        named = getattr(torch.optim, kind.__name__, None) is kind
        return {
            **self._source,
            **asdict(self.options),
            "sampler": dict(vars(self._config)),
            "fingerprint": self.identity()["fingerprint"],
            "micro_batch_size": self.micro_batch_size,
            "optimizer_class": kind.__name__ if named else kind,
            "optimizer_kwargs": self.optimizer_kwargs,
        }

    def save(self, path: str | Path) -> None:
        """Write what trains as one safetensors file, the arguments as JSON in its header; no pickle.

        The optimiser is not in it.
        """
        arguments = {name: value for name, value in self.arguments().items() if not name.startswith("optimizer")}
        if isinstance(arguments["model"], UnsavedModel):
            arguments["model"] = None
        save_learned(path, _FORMAT, self.state_dict(), {"arguments": arguments})

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
        tensors, content = load_learned(path, _FORMAT, "CFGUNetPolicy.save")
        arguments = content["arguments"]
        if model is not None:
            arguments["model"] = UnsavedModel(model)
        if arguments["model"] is None:
            raise ValueError(f"path={str(path)!r} was saved with a model object; pass it: load(path, model=...)")
        place = get_device(device)
        known = model or load_model(arguments["model"], place, arguments["dtype"], arguments.get("model_kwargs"))
        policy = cls(*make_spaces(known), lr_schedule=cls._dummy_schedule, device=str(place), **arguments)
        policy.load_state_dict(tensors)
        return policy


def _refuse(observation_space: Any, required: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Refuse what does not denoise, and SB3's options that have no meaning here; those that are off pass."""
    for name, value in options.items():
        if value:
            raise ValueError(
                f"{name}={value!r} does not go with CFGUNetPolicy, whose network, sigma and actions are the sampler's; "
                "leave it out"
            )
    if not {"timestep", "latents"} <= set(getattr(observation_space, "spaces", {})):
        raise ValueError(
            f"observation_space={observation_space} is not that of a denoising environment, which CFGUNetPolicy needs; "
            "make one with gym.make('DiffusionDenoise-...') or gym.make_vec, or use another policy"
        )
    for name, value in required.items():
        if value is None:
            raise ValueError(
                f"policy_kwargs has no {name!r}; pass policy_kwargs=diffusion_gym.agents.sb3.policy_kwargs(env)"
            )
