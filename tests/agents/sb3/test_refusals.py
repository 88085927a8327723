"""What is refused, and what the error says."""

import importlib
import sys

import gymnasium as gym
import pytest

pytest.importorskip("stable_baselines3")
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.vec_env import VecNormalize

from diffusion_gym.agents.sb3 import (
    DDPOPPO,
    CFGUNetPolicy,
    SB3VecEnv,
    ddpo_is,
    ddpo_sf,
    policy_kwargs,
)
from diffusion_gym.envs.spaces import make_spaces

T = 3


def test_without_sb3_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    monkeypatch.delitem(sys.modules, "diffusion_gym.agents.sb3")
    with pytest.raises(ImportError, match=r"pip install 'diffusion-denoise-gym\[sb3\]'"):
        importlib.import_module("diffusion_gym.agents.sb3")


def test_policy_needs_a_denoising_environment(make_env, ddpo):
    with pytest.raises(ValueError, match="is not that of a denoising environment, which CFGUNetPolicy needs"):
        PPO("CFGUNetPolicy", "Pendulum-v1")
    with pytest.raises(ValueError, match="policy_kwargs has no 'model'; pass policy_kwargs="):
        CFGUNetPolicy(*make_spaces(make_env(2).unwrapped.model), lambda left: 1e-3)
    for make in (ddpo_is, ddpo_sf, ddpo):
        with pytest.raises(ValueError, match="is no denoising environment; make one with gym.make"):
            make(gym.make("Pendulum-v1"))
    with pytest.raises(ValueError, match="policy='MlpPolicy' must be 'CFGUNetPolicy' or a subclass"):
        DDPOPPO("MlpPolicy", make_env(2))
    with pytest.raises(ValueError, match="'lora_rnak'.*lora_rank"):
        policy_kwargs(make_env(2), lora_rnak=2)


@pytest.mark.parametrize(
    "options",
    [{"squash_output": True}, {"use_sde": True}, {"net_arch": [64]}, {"normalize_images": True}, {"use_expln": True}],
)
def test_policy_refuses_what_would_change_actions(make_env, options):
    env = SB3VecEnv(make_env(2))
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}=.* does not go with CFGUNetPolicy"):
        CFGUNetPolicy(env.observation_space, env.action_space, lambda left: 1e-3, **{**policy_kwargs(env), **options})


def test_gsde_is_refused(make_env):
    for make in (ddpo_is, ddpo_sf):
        with pytest.raises(ValueError, match="use_sde=True does not go with CFGUNetPolicy"):
            make(make_env(2), use_sde=True)


def test_rollouts_must_be_whole_episodes(make_env, ddpo):
    for make in (ddpo_is, ddpo_sf, ddpo):
        with pytest.raises(ValueError, match="n_steps=4 must be a multiple of T=3"):
            make(make_env(2, num_inference_steps=T), n_steps=4)


@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_sb3s_own_algorithms_stop_on_broken_episodes(make_env, algorithm):
    env = SB3VecEnv(make_env(2, num_inference_steps=T))
    model = algorithm("CFGUNetPolicy", env, n_steps=4, policy_kwargs=policy_kwargs(env))
    with pytest.raises(ValueError, match="n_steps must be a multiple of T=3: the rollout ended within an episode"):
        model.learn(8)


def test_scaled_observations_and_actions_are_refused(make_env, ddpo):
    env = SB3VecEnv(make_env(2, num_inference_steps=T))
    for make in (ddpo_is, ddpo):
        with pytest.raises(ValueError, match="norm_obs=True.*use norm_obs=False"):
            make(VecNormalize(env))
    own = PPO("CFGUNetPolicy", VecNormalize(env), n_steps=T, policy_kwargs=policy_kwargs(env))
    with pytest.raises(ValueError, match="something normalises observations"):
        own.learn(2 * T)
    ddpo_is(VecNormalize(env, norm_obs=False, gamma=1.0)).learn(2 * T)  # rewards may be
    scaled = gym.wrappers.vector.RescaleAction(make_env(2, output="numpy"), -1.0, 1.0)
    with pytest.raises(ValueError, match="action_space=.* is not that of model=.*; take off the wrapper that scales"):
        ddpo_is(scaled)


def test_other_values_that_are_refused(make_env, ddpo):
    env = make_env(2, num_inference_steps=T)
    for options, message in (
        ({"batch_size": 4}, "batch_size=4 must be a multiple of T=3"),
        ({"trained_steps": (0.5, 0.5)}, "trained_steps=.* must be two fractions of T"),
        ({"micro_batch_size": -1}, "micro_batch_size=-1 must be 0 .automatic. or larger"),
        ({"normalization": "group"}, "normalization='group' must be one of prompt, batch, none"),
        ({"kl_weight": -1.0}, "kl_weight=-1.0 must be at least 0"),
        ({"kl_form": "js"}, "kl_form='js' must be one of"),
        ({"advantage_clip": 0}, "advantage_clip=0 must be larger than 0"),
        ({"normalize_advantage": True}, "normalize_advantage=True does not go with DDPOPPO, which uses normalization"),
        ({"policy_kwargs": {"value_network": True}}, "value_network=True is not trained with vf_coef=0"),
        ({"policy_kwargs": {"mixed_precision": "fp16"}}, "float16 gradients need loss scaling"),
    ):
        with pytest.raises(ValueError, match=message):
            ddpo(env, **options)
    for make in (ddpo_is, ddpo_sf, ddpo):
        with pytest.raises(ValueError, match="micro_batch_size=-1 must be 0 .all at once. or larger"):
            make(env, policy_kwargs={"micro_batch_size": -1})
    with pytest.raises(ValueError, match="eta=0.* makes every denoising step deterministic"):
        ddpo_is(make_env(2, eta=0.0))
