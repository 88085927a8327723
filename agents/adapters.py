"""What the adapters of Stable-Baselines3 and Tianshou share: DDPO's settings, environments, refusals."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from diffusion_gym.agents.denoising_env import denoising_env
from diffusion_gym.agents.identity import Identity, identity
from diffusion_gym.agents.optimization import OptimizerOptions
from diffusion_gym.agents.policy import DenoisingPolicy
from diffusion_gym.agents.policy_options import PolicyOptions
from diffusion_gym.config import SamplerConfig
from diffusion_gym.envs.spaces import make_spaces
from diffusion_gym.envs.vector import DenoisingVectorEnv
from diffusion_gym.models import DenoisingModel
from diffusion_gym.storage import exact_json, load_tensors, parse_json, save_tensors, tensors_metadata

# DDPO in the words of actor-critic libraries; each line says why.
ACTOR_CRITIC: Final = {
    "gamma": 1.0,  # the return is the reward of the picture, at every step of it
    "gae_lambda": 1.0,  # with gamma 1 and values of 0 the advantage is that return: A_t = r
    "vf_coef": 0.0,  # DDPO has no value function
    "ent_coef": 0.0,  # sigma_t is the sampler's: the entropy is constant
    "max_grad_norm": OptimizerOptions.max_grad_norm,  # as in the native agents
}
_SINGLE_SPACES: Final = {"observation_space": "single_observation_space", "action_space": "single_action_space"}


# --- environments ----------------------------------------------------------------------------------------------


def layers(env: Any) -> Iterator[Any]:
    """The wrappers of an environment from the outermost, then the environment itself."""
    layer = env
    while layer is not env.unwrapped:
        yield layer
        layer = layer.env
    yield layer


def to_numpy(value: Any) -> Any:
    """A tensor on the host as an array; anything else as NumPy makes an array of it."""
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def to_tensors(observation: Any, device: torch.device) -> dict[str, torch.Tensor]:
    """An observation, a mapping or a `Batch` of Tianshou, as tensors on `device`."""
    return {name: torch.as_tensor(value, device=device) for name, value in observation.items()}


def info_rows(infos: Mapping[str, Any], ids: np.ndarray, without: Collection[str] = ()) -> list[dict[str, Any]]:
    """Gymnasium's infos of a batch, with their `_key` masks, as one dictionary for each env of `ids`.

    Args:
        infos: a dictionary of arrays, tensors and such dictionaries, an entry an env.
        ids: envs, int64 `(M,)`.
        without: keys to leave out.
    """
    rows: list[dict[str, Any]] = [{} for _ in ids]
    for key, value in infos.items():
        if key.startswith("_") or key in without:
            continue
        parts = info_rows(value, ids, without) if isinstance(value, dict) else to_numpy(value)[ids]  # one transfer
        mask = infos.get(f"_{key}")
        for index in np.flatnonzero(np.ones(len(ids), dtype=bool) if mask is None else mask[ids]):
            rows[index][key] = parts[index]
    return rows


class SharedEnv:
    """The one vector environment that all envs of a library's vector environment share.

    Attributes:
        env: the vector environment.
        vector: the denoising environment below its wrappers.
    """

    env: VectorEnv[Any, Any, Any]
    vector: DenoisingVectorEnv

    def share(self, env: Any) -> None:
        """Take an environment.

        Raises:
            ValueError: it is no denoising vector environment.
        """
        if not (isinstance(env, VectorEnv) and isinstance(env.unwrapped, DenoisingVectorEnv)):
            raise ValueError(f"env={env!r} is no denoising vector environment; make one with gym.make_vec")
        self.env, self.vector = env, env.unwrapped

    def shared(self, name: str) -> Any:
        """An attribute of the environment or its wrappers; of the spaces those of one env.

        Raises:
            AttributeError: none of them has it.
        """
        name = _SINGLE_SPACES.get(name, name)
        for layer in layers(self.env):
            if hasattr(layer, name):
                return getattr(layer, name)
        raise AttributeError(f"the environment has no attribute {name!r}")

    def set_shared(self, name: str, value: Any, ids: Collection[int], argument: str) -> None:
        """Set an attribute where it is, or in the denoising environment; it counts for all envs.

        Args:
            name: of the attribute.
            value: what it is to be.
            ids: the envs that are meant, which must be all.
            argument: the argument that gave them, for errors.

        Raises:
            ValueError: envs are left out, which share all attributes.
        """
        if len(set(ids)) != self.env.num_envs:
            raise ValueError(f"{argument} leave envs out, but they share {name!r}; leave the argument out")
        setattr(next((layer for layer in layers(self.env) if hasattr(layer, name)), self.vector), name, value)

    def frames(self) -> list[Any]:
        """The decoded preview of every x_t, uint8 `(H, W, 3)`; None without `render_mode="rgb_array"`."""
        frames: Any = self.env.render()
        return [None] * self.env.num_envs if frames is None else list(frames)


def env_identity(env: Any) -> Identity:
    """The identity of a denoising environment, whatever is around it."""
    base = denoising_env(env)
    return identity(base.model, base.model_kwargs, base.sampler_config)


# --- policies, and files of what they learned -------------------------------------------------------------------


def taken(options: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Those of `options` that are called `names`, which are not in it any more."""
    return {name: options.pop(name) for name in names if name in options}


def policy_options(options: dict[str, Any]) -> PolicyOptions:
    """The `PolicyOptions` among the options of a library's policy, which are not in it any more."""
    return PolicyOptions(**taken(options, [entry.name for entry in fields(PolicyOptions)]))


def made_policy(model: DenoisingModel, config: SamplerConfig, options: PolicyOptions, library: str) -> DenoisingPolicy:
    """A policy that a library can train; raise a ValueError if all its steps are deterministic or gradients float16."""
    policy = DenoisingPolicy(model, config, **options.trained_part)
    policy.require_noise()
    policy.set_training(**options.computation)
    if policy.mixed_precision == "fp16" or model.dtype == torch.float16:
        dtype = str(model.dtype).removeprefix("torch.")
        raise ValueError(
            f"mixed_precision={policy.mixed_precision!r}, dtype={dtype!r}: float16 gradients need loss scaling, which "
            f"{library} does not do; use bf16 or bfloat16"
        )
    return policy


def save_learned(
    path: str | Path, file_format: str, tensors: Mapping[str, torch.Tensor], content: Mapping[str, Any]
) -> None:
    """Write tensors and JSON values, by name, as one safetensors file, without pickle; `load_learned` reads it."""
    save_tensors(path, tensors, {"format": file_format, **{name: exact_json(value) for name, value in content.items()}})


def load_learned(path: str | Path, file_format: str, writer: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What `save_learned` wrote; raise a ValueError for a file that is truncated, or not `writer`'s: of its format."""
    tensors, content = load_tensors(path), tensors_metadata(path)
    if content.pop("format", None) != file_format:
        raise ValueError(f"path={str(path)!r} is no file of {writer}")
    return tensors, {name: parse_json(text) for name, text in content.items()}


# --- refusals --------------------------------------------------------------------------------------------------


def require_spaces(model: DenoisingModel, observation_space: Any, action_space: Any, prefix: str = "") -> None:
    """Raise a ValueError that begins with `prefix` unless the spaces are the model's."""
    given = {"observation_space": observation_space, "action_space": action_space}
    for (name, space), expected in zip(given.items(), make_spaces(model), strict=True):
        if space != expected:
            raise ValueError(
                f"{prefix}{name}={space} is not that of model={model.name!r}, {expected}; take off the wrapper that "
                "scales, clips or changes observations or actions"
            )


def require_finite_rewards(rewards: np.ndarray, why: str, ids: np.ndarray | None = None) -> None:
    """Raise a ValueError that ends with `why` if rewards `(M,)` of the envs `ids`, 0 to M-1, are NaN or infinite."""
    if not np.isfinite(rewards).all():
        failed = (np.arange(len(rewards)) if ids is None else ids)[~np.isfinite(rewards)].tolist()
        raise ValueError(f"the reward of env {failed} is NaN or infinite, {why}")


def require_micro_batch_size(size: int) -> None:
    """Raise a ValueError for a negative number of transitions in a part; see `recomputed`."""
    if size < 0:
        raise ValueError(f"micro_batch_size={size!r} must be 0 (all at once) or larger")


def require_no_groups(normalization: str) -> None:
    """Raise a ValueError for `group`, which rollouts of a library do not have."""
    if normalization == "group":
        raise ValueError(
            "normalization='group' must be one of prompt, batch, none: a library's rollouts have no groups"
        )


def require_trained_values(value_network: bool, vf_coef: float) -> None:
    """Raise a ValueError for a value network that nothing trains, whose random values would be a baseline."""
    if value_network and not vf_coef:
        raise ValueError("value_network=True is not trained with vf_coef=0; pass vf_coef=0.5, or leave it out")
