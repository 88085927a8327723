"""Stable-Baselines3 drives the environment and expresses DDPO; see docs/stable-baselines3.md.

    envs = gym.make_vec("DiffusionDenoise-Shapes-Color-v0", num_envs=64)
    ddpo_is(envs, learning_rate=1e-4).learn(64 * 20 * 10)

Importing this module makes `"CFGUNetPolicy"` a name that SB3's PPO and A2C know; on a denoising environment they then
find the model themselves, compare it with the one of a file, and warn of discounts that are not DDPO's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

try:
    import stable_baselines3  # noqa: F401
except ImportError as error:
    raise ImportError("stable_baselines3 is not installed; pip install 'diffusion-denoise-gym[sb3]'") from error

from stable_baselines3 import A2C, PPO

from diffusion_gym.agents.sb3.buffer import TrajectoryBuffer
from diffusion_gym.agents.sb3.ddpo import DDPOPPO
from diffusion_gym.agents.sb3.env import SB3VecEnv
from diffusion_gym.agents.sb3.hooks import extend_algorithms
from diffusion_gym.agents.sb3.policy import CFGUNetPolicy
from diffusion_gym.agents.sb3.setup import Env, as_vec_env, ddpo_settings, policy_kwargs

__all__ = ["DDPOPPO", "CFGUNetPolicy", "SB3VecEnv", "TrajectoryBuffer", "ddpo_is", "ddpo_sf", "policy_kwargs"]

# SB3 looks policies up by name in these dictionaries; a new name changes nothing else.
for _algorithm in (PPO, A2C):
    _algorithm.policy_aliases["CFGUNetPolicy"] = CFGUNetPolicy
extend_algorithms()


def ddpo_is(env: Env, *, trained_steps: Sequence[float] | None = None, **changes: Any) -> PPO:
    """DDPO_IS as SB3's own PPO.

    With gamma = gae_lambda = 1 and values of 0 SB3's advantage is the reward of the finished picture at each of its
    steps, which PPO normalises within a minibatch: DDPO, equation 4. `ddpo_settings` has each setting and its reason.

    Args:
        env: a denoising environment; Gymnasium's vector environments are adapted.
        trained_steps: the part of the trajectory to train on, as fractions of T, 0 being the noise; its transitions
            come from a `TrajectoryBuffer`, which leaves trajectories out whose reward is not finite. None for all
            steps and SB3's own buffer, which cannot; such a reward then is an error.
        **changes: arguments of PPO that are to differ; `policy_kwargs` are changes to `policy_kwargs(env)`.

    Raises:
        ValueError: `env` is no denoising environment, `n_steps` is not a multiple of T, or
            `trained_steps` hold no stochastic step.
    """
    return _make(PPO, env, trained_steps, changes)


def ddpo_sf(env: Env, *, trained_steps: Sequence[float] | None = None, **changes: Any) -> A2C:
    """DDPO_SF as SB3's own A2C: one score-function update on each rollout, DDPO, equation 3.

    A2C takes the whole rollout through the network at once: `policy_kwargs={"micro_batch_size": 64}` bounds memory.

    Args:
        env: a denoising environment; Gymnasium's vector environments are adapted.
        trained_steps: see `ddpo_is`.
        **changes: arguments of A2C that are to differ; `policy_kwargs` are changes to `policy_kwargs(env)`.

    Raises:
        ValueError: see `ddpo_is`.
    """
    return _make(A2C, env, trained_steps, changes)


def _make(kind: Any, env: Env, trained_steps: Sequence[float] | None, changes: dict[str, Any]) -> Any:
    drops = trained_steps is not None or changes.get("rollout_buffer_class") is TrajectoryBuffer
    vec_env = as_vec_env(env, failed_rewards="keep" if drops else "refuse")
    return kind("CFGUNetPolicy", vec_env, **ddpo_settings(kind, vec_env, changes, trained_steps))
