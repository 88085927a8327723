"""Which model and sampler a policy or an environment has, as values that files store and that can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Final

import torch

from diffusion_gym.config import SamplerConfig
from diffusion_gym.models import DenoisingModel
from diffusion_gym.models.digest import weights_digest
from diffusion_gym.scheduling import StepTable

Identity = dict[str, Any]

_REMEDY: Final = "make the environment as the policy's was, or train a policy from this environment"


def fingerprint(model: DenoisingModel, config: SamplerConfig) -> str:
    """16 hexadecimal digits of a model's weights and schedule, the same on every device.

    Of each tensor of the network, the text encoders and the autoencoder 64 numbers count, so that a large model
    costs no pass over its weights. Training changes nearly all numbers of a tensor.

    Args:
        model: the model.
        config: the sampler, whose step table stands for the model's scheduler.
    """
    digest = weights_digest(model)
    table = model.step_table(config)
    for entry in fields(StepTable):
        value = getattr(table, entry.name)
        digest.update(value.cpu().numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode())
    return digest.hexdigest()[:16]


def identity(model: DenoisingModel, model_kwargs: Mapping[str, Any] | None, config: SamplerConfig) -> Identity:
    """The sampler's fields, the model by name and `model_kwargs`, the type of its weights and their fingerprint."""
    return {
        **vars(config),
        "model": model.name,
        "model_kwargs": {name: value for name, value in (model_kwargs or {}).items() if value is not None},
        "dtype": str(model.dtype).removeprefix("torch."),
        "fingerprint": fingerprint(model, config),
    }


def require_same(policy: Identity, env: Identity, owner: str = "the policy") -> None:
    """Raise a ValueError that names what differs, unless an environment is the one that a policy is for.

    A model of another name is the same one if its weights and its schedule are. Fields that an older file lacks are
    not compared.

    Args:
        policy: the policy's identity, perhaps from a file.
        env: the environment's.
        owner: what errors call the policy.
    """
    for name in (entry.name for entry in fields(SamplerConfig)):
        if policy.get(name, env[name]) != env[name]:
            raise ValueError(f"{name}={env[name]!r} of the environment is {policy[name]!r} in {owner}; {_REMEDY}")
    named = all(policy.get(name, env[name]) == env[name] for name in ("model", "model_kwargs", "dtype"))
    if policy.get("fingerprint", env["fingerprint"] if named else None) != env["fingerprint"]:
        raise ValueError(
            f"{_model(env)} of the environment is {_model(policy)} in {owner}, another model (fingerprints of weights "
            f"and schedule {env['fingerprint']} and {policy.get('fingerprint')}); {_REMEDY}"
        )


def require_fingerprint(stored: str | None, found: Identity, owner: str) -> None:
    """Raise a ValueError if the model that was loaded is not the one whose fingerprint `owner` has; None passes."""
    if stored not in (None, found["fingerprint"]):
        raise ValueError(
            f"{_model(found)} has fingerprint {found['fingerprint']} now, {stored} in {owner}: the folder or revision "
            "has changed since; use the model as it was, or train anew"
        )


def _model(found: Identity) -> str:
    return ", ".join(f"{name}={found.get(name)!r}" for name in ("model", "model_kwargs", "dtype") if found.get(name))
