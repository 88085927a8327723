"""What Stable-Baselines3 needs to run DDPO: an environment, the policy's arguments and its own settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv
from gymnasium.wrappers import TransformReward
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from diffusion_gym.agents.adapters import ACTOR_CRITIC, env_identity, require_finite_rewards, require_trained_values
from diffusion_gym.agents.algorithms.ddpo_is import ClippedConfig
from diffusion_gym.agents.denoising_env import denoising_env
from diffusion_gym.agents.rollout import trained_steps
from diffusion_gym.agents.sb3.buffer import TrajectoryBuffer, require_whole_episodes
from diffusion_gym.agents.sb3.env import WHY_FINITE, FailedRewards, SB3VecEnv
from diffusion_gym.agents.sb3.policy import OPTIONS, UnsavedModel
from diffusion_gym.registry import unknown_name

Env = gym.Env[Any, Any] | VectorEnv[Any, Any, Any] | VecEnv
FROM_ENV = ["model", "model_kwargs", "sampler", "dtype", "fingerprint"]


def policy_kwargs(env: Any, **options: Any) -> dict[str, Any]:
    """`CFGUNetPolicy`'s `policy_kwargs`: the environment's model and sampler, and `options`.

    They are JSON values, which SB3's `save` writes as text; a model that was passed to the environment as an object
    has no name to save, and `save` refuses it.

    Args:
        env: a denoising environment, single or vectorised, wrapped or not, SB3's or Gymnasium's.
        **options: of `CFGUNetPolicy`: those of `PolicyOptions`, `value_network`, `micro_batch_size`,
            `optimizer_class`, `optimizer_kwargs`, `device`.

    Raises:
        ValueError: `env` is no denoising environment, or an option does not exist.
    """
    for name in options:
        if name not in [*OPTIONS, *FROM_ENV]:
            raise ValueError(unknown_name("policy_kwargs", name, list(OPTIONS)))
    base, known = denoising_env(env), env_identity(env)
    # An object that was passed to the environment may share its name with a model that it is not.
    outer = getattr(env, "unwrapped", env)
    spec = getattr(outer.envs[0].unwrapped if hasattr(outer, "envs") else outer, "spec", None)
    named = spec is not None and isinstance(spec.kwargs.get("model", base.model.name), str)
    return {
        **{name: known[name] for name in ("model_kwargs", "dtype", "fingerprint")},
        "model": base.model.name if named else UnsavedModel(base.model),
        "sampler": dict(vars(base.sampler_config)),
        "device": str(base.device),
        **options,
    }


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
    denoising_env(env)
    if isinstance(env, VectorEnv):
        return SB3VecEnv(env, output=output, failed_rewards=failed_rewards)
    if isinstance(env, gym.Env):
        return env if failed_rewards == "keep" else TransformReward(env, _finite)
    if isinstance(env.unwrapped, SB3VecEnv):
        env.unwrapped.failed_rewards = failed_rewards
    normalize = unwrap_vec_normalize(env)
    if normalize is not None and normalize.norm_obs:
        raise ValueError(
            "env=VecNormalize(..., norm_obs=True) changes x_t and t, which the UNet must see as they are; use "
            "norm_obs=False"
        )
    return env


def _finite(reward: Any) -> float:
    require_finite_rewards(np.array([reward]), WHY_FINITE)
    return float(reward)


def ddpo_settings(
    kind: type[PPO] | type[A2C], env: Any, changes: Mapping[str, Any], part: Sequence[float] | None = None
) -> dict[str, Any]:
    """The arguments with which SB3's PPO and A2C are DDPO; each line says why.

    Args:
        kind: the algorithm.
        env: the environment.
        changes: arguments that are to differ; None is as if it were not there.
        part: the part of the trajectory to train on, whose stochastic steps then come from a `TrajectoryBuffer`.

    Raises:
        ValueError: `n_steps` is not a multiple of T, `part` holds no stochastic step, or a value network is not
            trained.
    """
    base, given = denoising_env(env), {name: value for name, value in changes.items() if value is not None}
    horizon: int = base.horizon
    settings: dict[str, Any] = {
        **ACTOR_CRITIC,
        "n_steps": horizon,  # whole trajectories
        "learning_rate": ClippedConfig.learning_rate,
        "normalize_advantage": True,  # rewards have no natural scale
        "device": str(base.device),  # where the environment and the model are
        **given,
        "policy_kwargs": policy_kwargs(env, **given.get("policy_kwargs", {})),
    }
    require_whole_episodes(settings["n_steps"], horizon)
    steps = list(range(horizon))
    if part is not None:
        steps = trained_steps(base.model.step_table(base.sampler_config), part).tolist()
        buffer = {"rollout_buffer_kwargs": {"horizon": horizon, "steps": steps}}
        settings = {"rollout_buffer_class": TrajectoryBuffer, **buffer, **settings}
    if issubclass(kind, PPO):
        envs = env.num_envs if isinstance(env, VecEnv | VectorEnv) else 1
        number = min(ClippedConfig.batch_size, envs * settings["n_steps"] // horizon)
        defaults = {"batch_size": number * len(steps), "n_epochs": ClippedConfig.inner_epochs}  # in transitions
        settings = {**defaults, "clip_range": ClippedConfig.clip_range, **settings}
    else:
        settings = {"use_rms_prop": False, **settings}  # else A2C would put RMSprop in place of the policy's AdamW
    require_trained_values(settings["policy_kwargs"].get("value_network", False), settings["vf_coef"])
    return settings


def is_denoising(env: Any) -> bool:
    """Whether there is a denoising environment below `env` in this process."""
    try:
        return bool(denoising_env(env))
    except ValueError:
        return False
