"""What `CFGUNetPolicy` refuses; each error names the argument, its value and the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from diffusion_gym.envs.spaces import make_spaces
from diffusion_gym.models import DenoisingModel


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


def checked(obs: Any) -> Any:
    """The observation, whose timesteps are whole numbers."""
    kind = obs["timestep"].dtype
    if kind.is_floating_point if isinstance(kind, torch.dtype) else np.issubdtype(kind, np.floating):
        raise ValueError(
            f"observation['timestep'] is {kind}: something normalises observations, which the UNet must see as they "
            "are; use VecNormalize(..., norm_obs=False)"
        )
    return obs


def refuse(options: Mapping[str, Any]) -> None:
    """SB3's options that have no meaning here; those that are off pass."""
    for name, value in options.items():
        if value:
            raise ValueError(
                f"{name}={value!r} does not go with CFGUNetPolicy, whose network, sigma and actions are the sampler's; "
                "leave it out"
            )


def require_finite(rewards: np.ndarray) -> np.ndarray:
    """Rewards `(N,)` as they are.

    Raises:
        ValueError: one of them is NaN or infinite, of which SB3's algorithms would make weights that are NaN.
    """
    if not np.isfinite(rewards).all():
        failed = np.flatnonzero(~np.isfinite(rewards)).tolist()
        raise ValueError(
            f"the reward of env {failed} is NaN or infinite, which would make SB3's weights NaN; let the reward return "
            "a number, or leave such trajectories out: ddpo_is or ddpo_sf with trained_steps=(0, 1), or DDPOPPO"
        )
    return rewards


def require_denoising(observation_space: Any) -> None:
    """Raise a ValueError unless states are those of a denoising environment."""
    if not {"timestep", "latents"} <= set(getattr(observation_space, "spaces", {})):
        raise ValueError(
            f"observation_space={observation_space} is not that of a denoising environment, which CFGUNetPolicy needs; "
            "make one with gym.make('DiffusionDenoise-...') or gym.make_vec, or use another policy"
        )


def require_spaces_of(model: DenoisingModel, observation_space: Any, action_space: Any) -> None:
    """Raise a ValueError unless the spaces are the model's own."""
    for name, given, own in zip(
        ("observation_space", "action_space"), (observation_space, action_space), make_spaces(model), strict=True
    ):
        if given != own:
            raise ValueError(
                f"{name}={given} is not that of model={model.name!r}, {own}; take wrappers off that scale, clip or "
                "change observations or actions"
            )


def same_device(one: torch.device, other: torch.device) -> bool:
    """Whether both are one device; `cuda` is `cuda:0`."""
    return one.type == other.type and (one.index or 0) == (other.index or 0)
