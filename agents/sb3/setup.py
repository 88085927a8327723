"""What Stable-Baselines3 needs to run DDPO: an environment, the policy's arguments and its own settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv
from gymnasium.wrappers import TransformReward
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper, unwrap_vec_normalize

from diffusion_gym.agents.adapters import chosen_steps
from diffusion_gym.agents.identity import Identity, identity
from diffusion_gym.agents.sb3.buffer import TrajectoryBuffer
from diffusion_gym.agents.sb3.checks import UnsavedModel, require_finite
from diffusion_gym.agents.sb3.env import FailedRewards, SB3VecEnv
from diffusion_gym.agents.sb3.policy import CFGUNetPolicy
from diffusion_gym.envs.vector import DenoisingVectorEnv
from diffusion_gym.registry import unknown_name

_POLICY_OPTIONS = [
    *("trainable", "lora_rank", "value_network", "micro_batch_size", "cfg_training", "mixed_precision"),
    *("gradient_checkpointing", "optimizer_class", "optimizer_kwargs", "device"),
]
FROM_ENV = ["model", "model_kwargs", "sampler", "dtype", "fingerprint"]


def policy_kwargs(env: Any, **options: Any) -> dict[str, Any]:
    """`CFGUNetPolicy`'s `policy_kwargs`: the environment's model and sampler, and `options`.

    They are JSON values, which SB3's `save` writes as text; a model that was passed to the environment as an object
    has no name to save, and `save` refuses it.

    Args:
        env: a denoising environment, single or vectorised, wrapped or not, SB3's or Gymnasium's.
        **options: of `CFGUNetPolicy`: `trainable`, `lora_rank`, `value_network`, `micro_batch_size`, `cfg_training`,
            `mixed_precision`, `gradient_checkpointing`, `optimizer_class`, `optimizer_kwargs`, `device`.

    Raises:
        ValueError: `env` is no denoising environment, or an option does not exist.
    """
    for name in options:
        if name not in _POLICY_OPTIONS + FROM_ENV:
            raise ValueError(unknown_name("policy_kwargs", name, _POLICY_OPTIONS))
    inner, spec = _denoising(env)
    model = inner.model
    # An object that was passed to the environment may share its name with a model that it is not.
    named = spec is not None and isinstance(spec.kwargs.get("model", model.name), str)
    found = env_identity(inner)
    return {
        **{name: found[name] for name in ("model_kwargs", "dtype", "fingerprint")},
        "model": model.name if named else UnsavedModel(model),
        "sampler": dict(vars(inner.sampler_config)),
        "device": str(model.device),
        **options,
    }


def env_identity(env: Any) -> Identity:
    """The identity of a denoising environment, whatever is around it."""
    inner, _ = _denoising(env)
    return identity(inner.model, inner.model_kwargs, inner.sampler_config)


def as_vec_env(
    env: Any, *, output: Literal["numpy", "torch"] = "numpy", failed_rewards: FailedRewards = "refuse"
) -> Any:
    """`env` as SB3 takes it: a Gymnasium vector environment in `SB3VecEnv`, anything else as it is.

    Args:
        env: a denoising environment.
        output: of `SB3VecEnv`.
        failed_rewards: of `SB3VecEnv`; one that is there already is set to it, and a single environment refuses by a
            wrapper. SB3's own `DummyVecEnv` keeps such rewards.

    Raises:
        ValueError: it is no denoising environment, or observations are normalised.
    """
    _denoising(env)
    if isinstance(env, VectorEnv):
        return SB3VecEnv(env, output=output, failed_rewards=failed_rewards)
    if isinstance(env, gym.Env):
        return env if failed_rewards == "keep" else TransformReward(env, _finite)
    inner = env
    while isinstance(inner, VecEnvWrapper):
        inner = inner.venv
    if isinstance(inner, SB3VecEnv):
        inner.failed_rewards = failed_rewards
    normalize = unwrap_vec_normalize(env) if isinstance(env, VecEnv) else None
    if normalize is not None and normalize.norm_obs:
        raise ValueError(
            "env=VecNormalize(..., norm_obs=True) changes x_t and t, which the UNet must see as they are; use "
            "norm_obs=False"
        )
    return env


def _finite(reward: Any) -> float:
    return float(require_finite(np.array([reward]))[0])


def horizon_of(env: Any) -> int:
    """T of a denoising environment."""
    return _denoising(env)[0].horizon


def ddpo_settings(env: Any, n_steps: int | None, options: dict[str, Any] | None) -> dict[str, Any]:
    """SB3's arguments that its PPO and A2C share when they are to be DDPO; each line says why.

    Args:
        env: the environment.
        n_steps: steps of a rollout; None for T.
        options: changes to `policy_kwargs(env)`.

    Raises:
        ValueError: `n_steps` is not a multiple of T.
    """
    inner, _ = _denoising(env)
    steps = inner.horizon if n_steps is None else n_steps
    if steps < 1 or steps % inner.horizon:
        raise ValueError(
            f"n_steps={steps} must be a multiple of T={inner.horizon}: the reward comes with the last denoising step, "
            "and a rollout that ends before it has none"
        )
    return {
        "n_steps": steps,  # whole trajectories
        "gamma": 1.0,  # the return is the reward of the picture, at every step of it
        "gae_lambda": 1.0,  # with gamma 1 and values of 0 the advantage is that return: A_t = r
        "vf_coef": 0.0,  # DDPO has no value function
        "ent_coef": 0.0,  # sigma_t is the sampler's: the entropy is constant
        "max_grad_norm": 1.0,  # as in the native agents
        "learning_rate": 1e-5,  # as in the native agents
        "device": str(inner.device),  # where the environment and the model are
        "policy_kwargs": policy_kwargs(env, **(options or {})),
    }


def ppo_settings(
    env: Any, n_steps: int | None, batch_size: int | None, options: dict[str, Any] | None
) -> dict[str, Any]:
    """`ddpo_settings`, and those of PPO alone; arguments as `DDPOPPO`'s."""
    settings = ddpo_settings(env, n_steps, options)
    chosen = min(64, _trajectories(env, settings)) * horizon_of(env) if batch_size is None else batch_size
    return {
        **settings,
        "batch_size": chosen,  # in transitions: T for each of up to 64 trajectories, the native agents' batch
        "n_epochs": 1,  # as in DDPO
        "clip_range": 1e-4,  # log-probabilities are means over dimensions, so that ratios are near 1
        "normalize_advantage": True,  # rewards have no natural scale
    }


def check_value_network(settings: dict[str, Any]) -> None:
    """Refuse a value network that nothing trains, whose random values would be a baseline."""
    if settings["policy_kwargs"].get("value_network") and not settings["vf_coef"]:
        raise ValueError("value_network=True is not trained with vf_coef=0; pass vf_coef=0.5, or leave it out")


def check_ddpo_options(
    policy: Any, micro_batch_size: int, normalization: str, clip: float, kl_weight: float, options: dict[str, Any]
) -> None:
    """Raise a ValueError for a value of `DDPOPPO` that is out of its range."""
    if policy != "CFGUNetPolicy" and not (isinstance(policy, type) and issubclass(policy, CFGUNetPolicy)):
        raise ValueError(f"policy={policy!r} must be 'CFGUNetPolicy' or a subclass: DDPO trains a denoising policy")
    if micro_batch_size < 1:
        raise ValueError(f"micro_batch_size={micro_batch_size!r} must be at least 1")
    if normalization not in ("prompt", "batch", "none"):
        raise ValueError(f"normalization={normalization!r} must be one of prompt, batch, none")
    if not clip > 0:
        raise ValueError(f"advantage_clip={clip!r} must be larger than 0")
    if not kl_weight >= 0:
        raise ValueError(f"kl_weight={kl_weight!r} must be at least 0")
    for name, instead in {
        "normalize_advantage": "normalization",
        "rollout_buffer_class": "its own",
        "rollout_buffer_kwargs": "its own",
        "clip_range_vf": "no bound on values",
        "use_sde": "the sampler's noise",
    }.items():
        if options.get(name):
            raise ValueError(f"{name}={options[name]!r} does not go with DDPOPPO, which uses {instead}; leave it out")


def trained_buffer(env: Any, part: Sequence[float] | None) -> dict[str, Any]:
    """SB3's arguments for a `TrajectoryBuffer` of the stochastic steps in a part of the trajectory; none for None."""
    if part is None:
        return {}
    inner, _ = _denoising(env)
    stochastic = (inner.model.step_table(inner.sampler_config).sigma > 0).nonzero().flatten().cpu()
    steps = chosen_steps(stochastic, inner.horizon, part).tolist()
    return {
        "rollout_buffer_class": TrajectoryBuffer,
        "rollout_buffer_kwargs": {"horizon": inner.horizon, "steps": steps},
    }


def is_denoising(env: Any) -> bool:
    """Whether there is a denoising environment below `env` in this process."""
    try:
        return bool(_denoising(env))
    except ValueError:
        return False


def _denoising(env: Any) -> tuple[DenoisingVectorEnv, Any]:
    """The denoising vector environment below `env`, and the spec that it was made by."""
    base: Any = getattr(env, "unwrapped", env)
    if isinstance(base, DummyVecEnv):
        base = base.envs[0].unwrapped
    spec = getattr(base, "spec", None)
    base = getattr(base, "vector", base)
    if not isinstance(base, DenoisingVectorEnv):
        raise ValueError(
            f"env={env!r} is no denoising environment; make one with gym.make('DiffusionDenoise-...') or gym.make_vec"
        )
    return base, spec


def _trajectories(env: Any, settings: dict[str, Any]) -> int:
    """Trajectories of a rollout."""
    number = env.num_envs if isinstance(env, VecEnv | VectorEnv) else 1
    return number * settings["n_steps"] // horizon_of(env)


Env = gym.Env[Any, Any] | VectorEnv[Any, Any, Any] | VecEnv
