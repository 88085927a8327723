"""What Stable-Baselines3's own algorithms do where they meet a denoising environment.

SB3 shows a policy the spaces alone, and compares nothing else when a file is loaded for another environment. Only the
algorithm has policy, environment and discounts, so its `_setup_model` and `set_env` are extended here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any
from warnings import warn

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from diffusion_gym.agents.adapters import env_identity
from diffusion_gym.agents.denoising_env import denoising_env
from diffusion_gym.agents.identity import require_same
from diffusion_gym.agents.sb3.policy import CFGUNetPolicy
from diffusion_gym.agents.sb3.setup import is_denoising, policy_kwargs

_EXTENDED = "_knows_denoising_environments"


def extend_algorithms() -> None:
    """Let PPO, A2C and what derives from them check their environment; other environments are as before.

    Once extended they stay so, however often this is called.
    """
    for owner, name, extend in (
        (OnPolicyAlgorithm, "_setup_model", _setup_model),
        (BaseAlgorithm, "set_env", _set_env),
    ):
        original = getattr(owner, name)
        if not hasattr(original, _EXTENDED):
            method = wraps(original)(extend(original))
            setattr(method, _EXTENDED, True)
            setattr(owner, name, method)


def _setup_model(original: Callable[..., None]) -> Callable[..., None]:
    def setup(algorithm: Any) -> None:
        known = is_denoising(algorithm.env)
        guided = issubclass(algorithm.policy_class, CFGUNetPolicy)
        if known and guided:
            given = algorithm.policy_kwargs
            if "model" not in given and "sampler" not in given:
                algorithm.policy_kwargs = policy_kwargs(algorithm.env, **given)
            _warn_of_discounts(algorithm)
        elif known:
            warn(
                f"policy={algorithm.policy_class.__name__!r} is a network of its own that learns to denoise from "
                "nothing: the model of the environment does not act and is not trained; use 'CFGUNetPolicy', or "
                "ddpo_is(env)",
                UserWarning,
                stacklevel=4,
            )
        original(algorithm)
        if known and guided:
            require_same(algorithm.policy.identity(), env_identity(algorithm.env))

    return setup


def _set_env(original: Callable[..., None]) -> Callable[..., None]:
    def set_env(algorithm: Any, env: Any, *args: Any, **options: Any) -> None:
        policy = getattr(algorithm, "policy", None)
        if isinstance(policy, CFGUNetPolicy) and is_denoising(env):
            require_same(policy.identity(), env_identity(env))
        original(algorithm, env, *args, **options)

    return set_env


def _warn_of_discounts(algorithm: Any) -> None:
    """A reward that comes at the end and is credited to all steps has gamma 1, and without values lambda 1."""
    decay, horizon = algorithm.gamma, denoising_env(algorithm.env).horizon
    if not algorithm.policy_kwargs.get("value_network"):
        decay *= algorithm.gae_lambda
    if decay != 1:
        warn(
            f"gamma={algorithm.gamma}, gae_lambda={algorithm.gae_lambda}: the first of T={horizon} steps gets "
            f"{decay ** (horizon - 1):.2g} of the picture's reward; DDPO has gamma=1, gae_lambda=1, as "
            "diffusion_gym.agents.sb3.ddpo_is and ddpo_sf set them",
            UserWarning,
            stacklevel=5,
        )
