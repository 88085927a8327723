"""Stable-Baselines3 on the denoising environment: adapter, policy, files, and what is refused."""

import base64
import importlib
import json
import math
import pickletools
import re
import sys
import warnings
import zipfile
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

pytest.importorskip("stable_baselines3")
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import CheckpointCallback, EvalCallback
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize
from torch.distributions import Normal

from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.agents.sb3 import (
    DDPOPPO,
    CFGUNetPolicy,
    SB3VecEnv,
    TrajectoryBuffer,
    ddpo_is,
    ddpo_sf,
    policy_kwargs,
)
from diffusion_gym.envs.spaces import make_spaces
from diffusion_gym.models import load_model
from diffusion_gym.wrappers import KLPenaltyVectorEnv

T = 3


@pytest.fixture
def envs(make_env):
    return make_env(3, num_inference_steps=T)


@pytest.fixture
def make_single(tiny_pipeline, make_env):
    """A single environment with the settings of `envs`."""
    keywords = make_env(1, num_inference_steps=T).spec.kwargs
    keywords = {key: keywords[key] for key in ("model", "reward", "prompts", "num_inference_steps")}
    return lambda **more: gym.make("DiffusionDenoise-v0", **keywords, **more)


def same(one, other):
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].dtype == other[key].dtype, key
        np.testing.assert_array_equal(one[key], other[key], err_msg=key)


# --- the vector environment ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["SameStep", "NextStep", "Disabled"])
@pytest.mark.parametrize("inner", ["torch", "numpy"])
def test_vec_env_is_what_sb3_makes_of_single_environments(make_env, make_single, mode, inner):
    ours = SB3VecEnv(make_env(3, num_inference_steps=T, autoreset_mode=mode, output=inner))
    reference = DummyVecEnv([make_single] * 3)  # SB3's own adapter
    ours.seed(5)
    reference.seed(5)
    same(ours.reset(), dict(reference.reset()))
    assert [info["prompt"] for info in ours.reset_infos] == [info["prompt"] for info in reference.reset_infos]
    rng = np.random.default_rng(0)
    for _ in range(2 * T + 1):
        actions = rng.standard_normal((3, 4, 4, 4)).astype(np.float32)
        (obs, rewards, dones, infos), (obs_, rewards_, dones_, infos_) = ours.step(actions), reference.step(actions)
        same(obs, dict(obs_))
        assert (rewards.dtype, dones.dtype) == (np.float32, np.bool_)
        np.testing.assert_allclose(rewards, rewards_, rtol=1e-5)  # decoded in batches of another size
        np.testing.assert_array_equal(dones, dones_)
        for info, info_ in zip(infos, infos_, strict=True):
            assert info.keys() - {"episode"} == info_.keys()
            assert info["TimeLimit.truncated"] is False and info["prompt"] == info_["prompt"]
            if "terminal_observation" in info_:
                same(info["terminal_observation"], info_["terminal_observation"])
                assert info["image"].shape == info_["image"].shape and info["image"].dtype == np.uint8
        assert [info["prompt"] for info in ours.reset_infos] == [info["prompt"] for info in reference.reset_infos]


def test_a_batch_is_stepped_at_once(make_env):
    env = make_env(3, num_inference_steps=T)
    calls = []
    step = env.unwrapped.step
    env.unwrapped.step = lambda actions: calls.append(len(actions)) or step(actions)
    adapted = SB3VecEnv(env)
    adapted.reset()
    adapted.step(np.zeros((3, 4, 4, 4), np.float32))
    assert calls == [3]


def test_episode_infos_are_those_of_vec_monitor(make_env):
    plain, monitored = (SB3VecEnv(make_env(3, num_inference_steps=T)) for _ in range(2))
    monitored = VecMonitor(monitored)
    for env in (plain, monitored):
        env.seed(1)
        env.reset()
    for _ in range(2):
        for _ in range(T):
            actions = np.ones((3, 4, 4, 4), np.float32)
            (_, rewards, dones, ours), (_, _, _, theirs) = plain.step(actions), monitored.step(actions)
        assert dones.all()
        for info, info_, reward in zip(ours, theirs, rewards, strict=True):
            assert info["episode"].keys() == info_["episode"].keys() == {"r", "l", "t"}
            assert info["episode"]["r"] == pytest.approx(float(info_["episode"]["r"])) == pytest.approx(float(reward))
            assert info["episode"]["l"] == info_["episode"]["l"] == T


def test_gymnasium_wrappers_stay_below(make_env):
    env = SB3VecEnv(RecordEpisodeStatistics(make_env(2, num_inference_steps=T, output="numpy")))
    env.reset()
    for _ in range(T):
        _, rewards, _, infos = env.step(np.ones((2, 4, 4, 4), np.float32))
    assert [info["episode"]["r"] for info in infos] == pytest.approx(rewards.tolist())
    assert env.env_is_wrapped(RecordEpisodeStatistics) == [True, True]
    assert env.env_is_wrapped(gym.wrappers.vector.NormalizeReward, indices=0) == [False]
    assert DenoisingPolicy.from_env(VecMonitor(env)).config.num_inference_steps == T


def test_attributes_and_methods(make_env):
    env = SB3VecEnv(make_env(3, num_inference_steps=T, render_mode="rgb_array"))
    assert env.get_attr("horizon", indices=[0, 2]) == [T, T]
    assert env.get_attr("action_space", 1) == [env.action_space]
    assert env.has_attr("prompt_set") and not env.has_attr("nothing")
    env.set_attr("note", "for all")
    assert env.get_attr("note") == ["for all"] * 3 and env.vector.note == "for all"
    with pytest.raises(ValueError, match="indices=.0. leave envs out"):
        env.set_attr("note", "for one", indices=[0])
    env.reset()
    frames = env.env_method("render", indices=[1])
    assert len(frames) == 1 and frames[0].shape == (8, 8, 3)
    np.testing.assert_array_equal(frames[0], env.get_images()[1])
    assert env.render().shape == (16, 16, 3)  # SB3 tiles three pictures as two by two
    env.close()
    with pytest.raises(gym.error.ClosedEnvironmentError):
        env.reset()


def test_seed_and_options_count_once(make_env):
    env = SB3VecEnv(make_env(2, num_inference_steps=T))
    assert env.seed(3) == [3, 4]
    env.set_options({"prompt": "a red circle", "latents": np.ones((4, 4, 4))})
    assert (env.reset()["latents"] == 1).all() and env.reset_infos[1]["prompt"] == "a red circle"
    fresh = env.reset()["latents"]
    env.seed(3)
    first = env.reset()["latents"]
    env.seed(3)
    again = env.reset()["latents"]
    assert (first == again).all() and (fresh != first).all()
    env.set_options([{"prompt": "two blue stars"}, {}])
    with pytest.raises(ValueError, match="options\\['prompt'\\] must be given for all 2"):
        env.reset()


def test_torch_output_stays_in_torch(make_env):
    env, numbers = (SB3VecEnv(make_env(2, num_inference_steps=T), output=kind) for kind in ("torch", "numpy"))
    for each in (env, numbers):
        each.seed(0)
        observation = each.reset()
    for _ in range(T):
        step, reference = (each.step(np.ones((2, 4, 4, 4), np.float32)) for each in (env, numbers))
    for values, expected in ((step[0], reference[0]), (step[3][1], reference[3][1])):
        values, expected = values.get("terminal_observation", values), expected.get("terminal_observation", expected)
        assert all(isinstance(value, torch.Tensor) for value in values.values())
        same({key: value.numpy() for key, value in values.items()}, expected)
    assert isinstance(step[1], np.ndarray) and isinstance(observation["latents"], np.ndarray)


def test_vec_env_refuses(make_env, make_single):
    with pytest.raises(ValueError, match="no denoising vector environment; make one with gym.make_vec"):
        SB3VecEnv(make_single())
    with pytest.raises(ValueError, match="no denoising vector environment"):
        SB3VecEnv(gym.make_vec("CartPole-v1", num_envs=2))
    with pytest.raises(ValueError, match="output='jax' must be 'numpy' or 'torch'"):
        SB3VecEnv(make_env(2), output="jax")
    with pytest.raises(ValueError, match="is unbounded, which SB3 refuses; take the wrapper off that clips"):
        SB3VecEnv(gym.wrappers.vector.ClipAction(make_env(2, output="numpy")))


def test_check_env_passes_with_known_warnings(make_single):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(make_single(), warn=True)
    told = {str(warning.message)[:60] for warning in caught if "stable_baselines3" in warning.filename}
    assert {line.split(" is ")[0][:40] for line in told} <= {
        "It seems that your observation latents",  # a latent is no uint8 picture, and no CnnPolicy reads it
        "It seems that your observation space lat",
        "The minimal resolution for an image",
        "We recommend you to use a symmetric and ",  # the bounds never clip, and nothing scales by them
    }


# --- the policy ------------------------------------------------------------------------------------------------


def model_of(env, algorithm=PPO, **changes):
    make = {PPO: ddpo_is, A2C: ddpo_sf}[algorithm]
    return make(env, **changes)


def observed(env, seed=0):
    """States at different steps of different episodes."""
    observation = env.reset(seed=seed)[0]
    table = env.unwrapped.step_table.timesteps
    return {**observation, "timestep": table[torch.arange(len(observation["latents"])) % len(table)][:, None]}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_policy_is_the_samplers_gaussian(make_env, perturb, reduction):
    env = make_env(6, num_inference_steps=T, log_prob_reduction=reduction)
    policy = model_of(env).policy
    perturb(policy.actor)
    states = observed(env)
    known = policy.actor.distribution(states)
    gaussian = Normal(known.mean, known.std.expand_as(known.mean))
    assert torch.equal(known.std.flatten(), policy.actor.table.sigma[torch.arange(6) % T])
    actions, values, log_probs = policy(states)
    reduced = {"mean": lambda x: x.flatten(1).mean(1), "sum": lambda x: x.flatten(1).sum(1)}[reduction]
    torch.testing.assert_close(log_probs, reduced(gaussian.log_prob(actions)), rtol=1e-5, atol=1e-5)
    assert values.shape == (6, 1) and not values.any() and actions.shape == (6, 4, 4, 4)
    values, again, entropies = policy.evaluate_actions(states, actions.flatten(1))  # flat, as SB3's buffers keep them
    torch.testing.assert_close(again, log_probs, rtol=0, atol=1e-6)
    torch.testing.assert_close(entropies, reduced(gaussian.entropy()), rtol=1e-5, atol=1e-5)
    assert values.shape == (6, 1) and not entropies.requires_grad
    assert torch.equal(policy(states, deterministic=True)[0], known.mean)
    assert torch.equal(policy.get_distribution(states).mode(), known.mean)


def test_samples_have_the_samplers_noise(make_env):
    env = make_env(2, num_inference_steps=T)
    policy = model_of(env).policy
    states = {key: value[:1].expand(4000, *value.shape[1:]) for key, value in observed(env).items()}
    with torch.no_grad():
        known = policy.actor.distribution(observed(env))
        noise = (policy(states)[0] - known.mean[:1]) / known.std[0]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_predict_takes_one_state_or_many_and_clips_nothing(make_env, make_single):
    env, single = make_env(2, num_inference_steps=T), make_single()
    model = model_of(env)
    state, _ = single.reset(seed=0)
    action, nothing = model.predict(state, deterministic=True)
    expected = model.policy.actor.distribution({key: value[None] for key, value in state.items()}).mean[0]
    assert nothing is None and action.dtype == np.float32
    np.testing.assert_array_equal(action, expected.detach().numpy())
    far = {**observed(env), "latents": torch.full((2, 4, 4, 4), 30.0)}  # ten times what a latent ever is
    with torch.no_grad():
        free = model.policy.actor.distribution(far).mean.numpy()
    assert np.abs(free).max() > 20
    np.testing.assert_array_equal(model.predict(far, deterministic=True)[0], free)
    assert all(parameter.grad is None for parameter in model.policy.parameters())


def test_the_name_is_known_to_sb3(make_env):
    for algorithm in (PPO, A2C):
        env = SB3VecEnv(make_env(2, num_inference_steps=T))
        model = algorithm("CFGUNetPolicy", env, n_steps=T, policy_kwargs=policy_kwargs(env, lora_rank=2))
        assert isinstance(model.policy, CFGUNetPolicy) and model.policy.actor.lora_rank == 2
    assert type(ddpo_is(make_env(2))) is PPO and type(ddpo_sf(make_env(2))) is A2C


def test_value_network_is_learned(make_env):
    env = make_env(4, num_inference_steps=T)
    model = model_of(env, vf_coef=0.5, learning_rate=1e-2, policy_kwargs={"value_network": True})
    states = observed(env)
    before = model.policy.predict_values(states).detach()
    assert before.shape == (4, 1) and before.std() > 0
    model.learn(4 * T)
    assert not torch.allclose(before, model.policy.predict_values(states))


@pytest.mark.parametrize("size", [1, 4, 5])
def test_micro_batches_give_the_same_gradient(make_env, perturb, size):
    env = make_env(6, num_inference_steps=T)
    policy = model_of(env, policy_kwargs={"value_network": True}, vf_coef=0.5).policy
    perturb(policy.actor)
    states, actions = observed(env), torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    gradients = []
    for policy.micro_batch_size in (0, size):
        values, log_probs, entropies = policy.evaluate_actions(states, actions)
        assert values.shape == (6, 1) and log_probs.shape == entropies.shape == (6,)
        policy.zero_grad()
        (values.sum() + (log_probs * torch.arange(6)).sum()).backward()
        gradients.append([p.grad.clone() for p in policy.parameters() if p.requires_grad])
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm() + 1e-6


def test_micro_batches_do_not_keep_activations(make_env):
    env = make_env(6, num_inference_steps=T)
    policy = model_of(env, policy_kwargs={"trainable": "full"}).policy
    states, actions = observed(env), torch.zeros(6, 4, 4, 4)
    kept = []
    for policy.micro_batch_size in (0, 2):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):  # noqa: B023
            policy.evaluate_actions(states, actions)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 20


# --- the algorithms --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [ddpo_is, ddpo_sf])
def test_settings_are_those_of_ddpo(make_env, make):
    model = make(make_env(5, num_inference_steps=T), learning_rate=3e-5)
    assert (model.gamma, model.gae_lambda, model.vf_coef, model.ent_coef, model.n_steps) == (1, 1, 0, 0, T)
    assert model.max_grad_norm == 1 and model.normalize_advantage and model.learning_rate == 3e-5
    optimizer = model.policy.optimizer
    assert type(optimizer) is torch.optim.AdamW
    group = optimizer.param_groups[0]
    assert (group["weight_decay"], group["eps"], group["betas"], group["lr"]) == (1e-4, 1e-8, (0.9, 0.999), 3e-5)
    assert {id(p) for p in group["params"]} == {id(p) for p in model.policy.actor.trainable_parameters().values()}
    if make is ddpo_is:
        assert model.clip_range(1.0) == 1e-4 and model.batch_size == 5 * T and model.n_epochs == 1


def test_single_environments_work_too(make_single):
    env = make_single()
    model = ddpo_is(env, n_steps=2 * T, batch_size=2 * T, learning_rate=1e-2)
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    model.learn(2 * T)
    assert any(not torch.equal(before[name], value) for name, value in model.policy.state_dict().items())


def test_learning_leaves_the_environments_model_alone(make_env):
    env = make_env(4, num_inference_steps=T)
    before = {name: value.clone() for name, value in env.unwrapped.model.unet.state_dict().items()}
    for trainable in ("lora", "full"):
        ddpo_sf(env, learning_rate=0.1, policy_kwargs={"trainable": trainable}).learn(4 * T)
    assert all(torch.equal(before[name], value) for name, value in env.unwrapped.model.unet.state_dict().items())


def test_evaluate_policy_plays_the_means(make_env, perturb):
    model = model_of(make_env(3, num_inference_steps=T))
    perturb(model.policy.actor, 0.1)
    evaluated = SB3VecEnv(make_env(3, num_inference_steps=T))
    evaluated.seed(11)
    rewards, lengths = evaluate_policy(model, VecMonitor(evaluated), 3, deterministic=True, return_episode_rewards=True)
    env = make_env(3, num_inference_steps=T)
    observation, _ = env.reset(seed=11)
    with torch.no_grad():
        for _ in range(T):
            action = model.policy.actor.distribution(observation).mean
            observation, expected, _, _, _ = env.step(action)
    assert lengths == [T] * 3
    np.testing.assert_allclose(rewards, expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize("algorithm", ["ddpo_is", "DDPOPPO"])
def test_callbacks_and_tensorboard(make_env, tmp_path, algorithm):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    make = {"ddpo_is": ddpo_is, "DDPOPPO": lambda env, **options: DDPOPPO("CFGUNetPolicy", env, **options)}[algorithm]
    model = make(make_env(2, num_inference_steps=T), tensorboard_log=str(tmp_path / "logs"))
    evaluated = VecMonitor(SB3VecEnv(make_env(2, num_inference_steps=T)))
    evaluation = EvalCallback(
        evaluated, n_eval_episodes=2, eval_freq=T, best_model_save_path=str(tmp_path / "best"), verbose=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the environments differ by their monitor
        model.learn(2 * 2 * T, callback=[evaluation, CheckpointCallback(T, str(tmp_path / "saved"))])
    assert (tmp_path / "best" / "best_model.zip").exists() and len(list((tmp_path / "saved").iterdir())) == 2
    assert math.isfinite(evaluation.best_mean_reward)
    events = EventAccumulator(str(next((tmp_path / "logs").iterdir())))
    events.Reload()
    shown = set(events.Tags()["scalars"])
    assert {"rollout/ep_rew_mean", "rollout/ep_len_mean", "eval/mean_reward", "train/approx_kl"} <= shown
    assert events.Scalars("rollout/ep_len_mean")[0].value == T


# --- DDPOPPO's own parts ---------------------------------------------------------------------------------------


def ddpo(env, **options):
    return DDPOPPO("CFGUNetPolicy", env, **{"seed": 0, **options})


def rolled(model):
    """Let `model` collect one rollout."""
    _, callback = model._setup_learn(model.n_steps * model.n_envs, None)
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return model.rollout_buffer


def test_buffer_holds_what_sb3s_holds_in_half_the_room(make_env):
    models, samples = [], []
    for own in ({"rollout_buffer_class": TrajectoryBuffer, "rollout_buffer_kwargs": {"horizon": T}}, {}):
        options = {"n_steps": 2 * T, "seed": 4, "gamma": 0.9, "gae_lambda": 0.7, "vf_coef": 0.5}
        model = ddpo_is(make_env(2, num_inference_steps=T), **options, **own, policy_kwargs={"value_network": True})
        (sample,) = rolled(model).get(None)
        models.append(model)
        samples.append((sample, torch.argsort(sample.old_log_prob)))  # each has its own order
    ours, theirs = models
    (one, order), (other, order_) = samples
    assert len(order) == 2 * 2 * T and one.old_log_prob.unique().numel() == len(order)
    for name in ("old_values", "old_log_prob", "advantages", "returns"):
        torch.testing.assert_close(getattr(one, name)[order], getattr(other, name)[order_], rtol=1e-5, atol=1e-6)
    assert torch.equal(one.actions.flatten(1)[order], other.actions[order_])
    for key in ("prompt", "timestep", "latents"):
        assert torch.equal(one.observations[key][order], other.observations[key][order_]), key
    buffer, reference = ours.rollout_buffer, theirs.rollout_buffer
    assert buffer.latents.numel() == 2 * 2 * (T + 1) * 64  # theirs: 2 * 2 * T states and as many actions
    assert reference.observations["latents"].size + reference.actions.size == 2 * (2 * 2 * T * 64)
    assert buffer.tokens.shape[0] == 2 * 2 and reference.observations["prompt"].shape[0] == 2 * 2 * T
    ours.learn(2 * 2 * T)  # SB3's own train reads it


def test_buffer_refuses_other_rollouts(make_env):
    env = make_env(2, num_inference_steps=T)
    spaces = make_spaces(env.unwrapped.model)
    with pytest.raises(ValueError, match="n_steps=4 must be a multiple of T=3"):
        TrajectoryBuffer(4, *spaces, "cpu", horizon=T, n_envs=2)
    buffer = TrajectoryBuffer(T, *spaces, "cpu", horizon=T, n_envs=2)
    observation, _ = env.reset(seed=0)
    rest = (np.zeros(2), np.ones(2), torch.zeros(2, 1), torch.zeros(2))
    buffer.add(observation, np.ones((2, 4, 4, 4), np.float32), *rest)
    with pytest.raises(ValueError, match="all envs must begin together"):
        buffer.add(observation, np.ones((2, 4, 4, 4), np.float32), *rest)
    rest = (np.zeros(2), np.zeros(2), torch.zeros(2, 1), torch.zeros(2))
    with pytest.raises(ValueError, match="is not the action before it; take the wrapper off that clips"):
        buffer.add(observation, np.ones((2, 4, 4, 4), np.float32), *rest)


@pytest.mark.parametrize("algorithm", ["ddpo_is", "DDPOPPO"])
def test_step_rewards_become_rewards_to_go(make_env, perturb, algorithm):
    """With the KL wrapper A_t = r - beta (KL_t + ... + KL_T)."""
    env = KLPenaltyVectorEnv(make_env(2, num_inference_steps=T), policy=None, beta=0.01)
    make = {"ddpo_is": ddpo_is, "DDPOPPO": lambda env: ddpo(env, normalization="none", advantage_clip=1e9)}[algorithm]
    model = make(env)
    env.policy = perturb(model.policy.actor, 0.3)
    buffer = rolled(model)
    if algorithm == "DDPOPPO":
        model._normalize_rewards()
        advantages, latents, tokens = buffer.step_advantages, buffer.latents, buffer.tokens
    else:
        advantages = torch.as_tensor(buffer.advantages)
        observations = {key: torch.as_tensor(value) for key, value in buffer.observations.items()}
        last = torch.as_tensor(buffer.actions[-1]).view(1, 2, 4, 4, 4)
        latents, tokens = torch.cat([observations["latents"], last]), observations["prompt"][0]
    kl = torch.stack(
        [
            model.policy.actor.distribution(states).kl(model.policy.actor.reference_distribution(states)).detach()
            for states in (model.policy.actor.observation(latents[step], step, tokens) for step in range(T))
        ]
    )
    images = env.unwrapped.model.decode(latents[-1]).mean((1, 2, 3))
    assert kl.min() > 0.01 and advantages.shape == (T, 2)
    for step in range(T):
        expected = images - 0.01 * kl[step:].sum(0)
        torch.testing.assert_close(advantages[step], expected, rtol=1e-4, atol=1e-5)
    if algorithm == "DDPOPPO":
        model.learn(2 * T)
        model = ddpo(env)
        env.policy = perturb(model.policy.actor, 0.3)
        with pytest.raises(ValueError, match="normalization='prompt' is for a reward at the end"):
            model.learn(2 * T)


def test_samples_whose_reward_failed_are_left_out(make_env, perturb):
    def sometimes(images, prompts, metadata):
        scores = images.mean((1, 2, 3))
        scores[1] = float("nan")
        return scores

    model = ddpo(make_env(4, num_inference_steps=T, reward=sometimes), learning_rate=1e-2)
    model.learn(4 * T)
    assert all(torch.isfinite(value).all() for value in model.policy.state_dict().values())
    assert model.logger.name_to_value["train/samples_dropped"] == 1
    with pytest.raises(RuntimeError, match="all 2 rewards of the rollout are NaN or infinite"):
        ddpo(make_env(2, num_inference_steps=T, reward=lambda images, *_: images.mean((1, 2, 3)) * math.nan)).learn(1)


def test_target_kl_stops_before_the_step(make_env, perturb):
    model = ddpo(make_env(4, num_inference_steps=T), target_kl=1e-9, n_epochs=5, learning_rate=1e-2, batch_size=2 * T)
    model.learn(4 * T)
    taken = [int(row["step"]) for row in model.policy.optimizer.state_dict()["state"].values()]
    assert set(taken) == {1}  # the first update is at ratio 1, the second is stopped


# --- files -----------------------------------------------------------------------------------------------------


def test_sb3s_save_holds_no_model(make_env, tmp_path, perturb):
    """What SB3 pickles of its own algorithms: small things; the weights in the file are those that train."""
    env = make_env(2, num_inference_steps=T)
    model = ddpo_is(env)
    model.learn(2 * T)
    perturb(model.policy.actor)
    model.save(tmp_path / "ppo")
    with zipfile.ZipFile(tmp_path / "ppo.zip") as archive:
        data = json.loads(archive.read("data"))
        weights = torch.load(archive.open("policy.pth"), weights_only=True)
    pickled = {
        key: value[":serialized:"] for key, value in data.items() if isinstance(value, dict) and ":type:" in value
    }
    assert set(pickled) == {
        *("policy_class", "observation_space", "action_space", "lr_schedule", "clip_range", "rollout_buffer_class"),
        *("_last_obs", "_last_episode_starts", "ep_info_buffer", "ep_success_buffer"),
    }
    assert data["policy_kwargs"]["model"] == env.unwrapped.model.name  # as text
    for key, text in pickled.items():
        names = {str(argument) for _, argument, _ in pickletools.genops(base64.b64decode(text)) if argument is not None}
        assert not any("diffusers" in name or "peft" in name or "torch" in name for name in names), key
    assert weights.keys() == {f"actor.unet.{name}" for name in model.policy.actor.trainable_parameters()}


@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_sb3s_load_gives_equal_predictions(make_env, tmp_path, perturb, algorithm):
    env = make_env(2, num_inference_steps=T)
    options = {"vf_coef": 0.5, "policy_kwargs": {"trainable": "full", "value_network": True}}
    model = model_of(env, algorithm, **options)
    perturb(model.policy.actor)
    model.learn(2 * T)
    model.save(tmp_path / "saved.zip")
    states = observed(env)
    for loaded in (algorithm.load(tmp_path / "saved.zip"), algorithm.load(tmp_path / "saved.zip", env=SB3VecEnv(env))):
        np.testing.assert_array_equal(*(m.predict(states, deterministic=True)[0] for m in (model, loaded)))
        assert torch.equal(model.policy.predict_values(states), loaded.policy.predict_values(states))
        assert loaded.policy.actor.config == model.policy.actor.config
    loaded.learn(2 * T)


def no_pickle(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something was pickled")

    import cloudpickle

    for module, name in ((torch, "save"), (torch, "load"), (cloudpickle, "dumps"), (cloudpickle, "loads")):
        monkeypatch.setattr(module, name, refuse)


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_policy_file(make_env, tmp_path, perturb, monkeypatch, trainable):
    env = make_env(2, num_inference_steps=T)
    policy = model_of(env, policy_kwargs={"trainable": trainable}).policy
    perturb(policy.actor)
    no_pickle(monkeypatch)
    policy.save(tmp_path / "policy.safetensors")
    loaded = CFGUNetPolicy.load(tmp_path / "policy.safetensors", device="cpu")
    states = observed(env)
    np.testing.assert_array_equal(*(p.predict(states, deterministic=True)[0] for p in (policy, loaded)))
    other = model_of(env, policy_kwargs={"trainable": "full" if trainable == "lora" else "lora"}).policy
    with pytest.raises(RuntimeError, match="the weights are those of another policy"):
        other.load_state_dict(loaded.state_dict())
    (tmp_path / "broken.safetensors").write_bytes((tmp_path / "policy.safetensors").read_bytes()[:200])
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        CFGUNetPolicy.load(tmp_path / "broken.safetensors")


def test_ddpoppo_file_goes_on(make_env, tmp_path, monkeypatch):
    """A run that was saved, loaded and continued is the run that went on."""

    def start():
        return ddpo(make_env(4, num_inference_steps=T), kl_weight=0.1, learning_rate=1e-2, statistics_min_count=2)

    def go_on(model):
        model.env.seed(9)
        torch.manual_seed(9)
        np.random.seed(9)
        model._last_obs = None
        return model.learn(4 * T, reset_num_timesteps=False).policy.state_dict()

    whole = start()
    whole.learn(4 * T)
    first = {name: value.clone() for name, value in whole.policy.state_dict().items()}
    expected = go_on(whole)
    assert any(not torch.equal(first[name], expected[name]) for name in first)
    part = start()
    part.learn(4 * T)
    no_pickle(monkeypatch)
    part.save(tmp_path / "run")
    with zipfile.ZipFile(tmp_path / "run.zip") as archive:
        assert set(archive.namelist()) == {"diffusion_gym.json", "tensors.safetensors"}
    loaded = DDPOPPO.load(tmp_path / "run", make_env(4, num_inference_steps=T))
    assert loaded.num_timesteps == 4 * T and loaded.kl_weight == 0.1 and loaded._n_updates == 1
    assert loaded.statistics.state() == part.statistics.state()
    states = observed(make_env(2, num_inference_steps=T))
    np.testing.assert_array_equal(*(m.predict(states, deterministic=True)[0] for m in (part, loaded)))
    for name, value in go_on(loaded).items():
        assert torch.equal(value, expected[name]), name
    fresh = start()
    fresh.set_parameters(tmp_path / "run.zip")
    assert all(torch.equal(value, first[name]) for name, value in fresh.policy.state_dict().items())


def test_ddpoppo_files_that_do_not_fit(make_env, tmp_path, exact_end_pipeline):
    model = ddpo(make_env(2, num_inference_steps=T), learning_rate=lambda left: 1e-3 * left)
    with pytest.raises(ValueError, match="DDPOPPO pickles nothing; give a number"):
        model.save(tmp_path / "run")
    with pytest.raises(ValueError, match="include=\\['env'\\]: DDPOPPO saves no other"):
        model.save(tmp_path / "run", include=["env"])
    ddpo(make_env(2, num_inference_steps=T)).save(tmp_path / "run.zip")
    with pytest.raises(ValueError, match="env=None: DDPOPPO.load needs the environment"):
        DDPOPPO.load(tmp_path / "run")
    with pytest.raises(ValueError, match="was trained from"):
        DDPOPPO.load(tmp_path / "run", make_env(2, num_inference_steps=T, model=str(exact_end_pipeline)))
    (tmp_path / "cut.zip").write_bytes((tmp_path / "run.zip").read_bytes()[:300])
    with pytest.raises(ValueError, match="truncated or no file of DDPOPPO.save"):
        DDPOPPO.load(tmp_path / "cut.zip", make_env(2, num_inference_steps=T))


def test_a_model_object_is_never_pickled(make_env, tiny_pipeline, tmp_path):
    env = make_env(2, num_inference_steps=T, model=load_model(str(tiny_pipeline), "cpu", "float32"))
    model = ddpo_is(env)
    assert model.policy.actor.model is env.unwrapped.model
    with pytest.raises(TypeError, match="given as an object, which is not pickled"):
        model.save(tmp_path / "ppo")
    model.policy.save(tmp_path / "policy.safetensors")
    with pytest.raises(ValueError, match="saved with a model object; pass it"):
        CFGUNetPolicy.load(tmp_path / "policy.safetensors", device="cpu")
    loaded = CFGUNetPolicy.load(tmp_path / "policy.safetensors", device="cpu", model=env.unwrapped.model)
    states = observed(env)
    np.testing.assert_array_equal(*(p.predict(states, deterministic=True)[0] for p in (model.policy, loaded)))


@pytest.mark.gpu
def test_devices(make_env, tmp_path):
    """On a GPU the whole of DDPOPPO runs there; a policy moves by loading its model, and leaves the other in place."""
    env = make_env(2, num_inference_steps=T, device="cuda")
    model = ddpo(env, kl_weight=0.1, learning_rate=1e-2)
    model.learn(2 * 2 * T)
    assert model.rollout_buffer.latents.device.type == "cuda"
    model.save(tmp_path / "run.zip")
    moved = DDPOPPO.load(tmp_path / "run.zip", make_env(2, num_inference_steps=T))
    assert moved.policy.device.type == "cpu" and model.policy.device.type == "cuda"
    states = observed(make_env(2, num_inference_steps=T))
    ours, theirs = (m.predict(states, deterministic=True)[0] for m in (model, moved))
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)
    crossed = ddpo_is(make_env(2, num_inference_steps=T), device="cuda")  # environment on the CPU, policy on the GPU
    assert crossed.policy.device.type == "cuda" and crossed.env.vector.model.unet.device.type == "cpu"
    crossed.learn(2 * T)


# --- the page --------------------------------------------------------------------------------------------------


def test_the_page_runs(tmp_path, monkeypatch):
    """Every block of docs/stable-baselines3.md in order, with fewer environments and steps."""
    page = (Path(__file__).parents[2] / "docs" / "stable-baselines3.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    assert len(blocks) == 6
    monkeypatch.chdir(tmp_path)
    scope = {}
    for block in blocks:
        for large, small in (("=64,", "=4,"), ("64 * T", "4 * T"), ("32 * T", "2 * T"), ("T = 10", "T = 3")):
            block = block.replace(large, small)
        exec(block.replace("num_inference_steps=10", "num_inference_steps=3"), scope)
    assert scope["action"].shape == (4, 8, 8) and (tmp_path / "model").is_dir()
    for target in re.findall(r"\]\(([^)#]+)", page):
        assert target.startswith("http") or (Path(__file__).parents[2] / "docs" / target).exists(), target


# --- what is refused -------------------------------------------------------------------------------------------


def test_without_sb3_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    monkeypatch.delitem(sys.modules, "diffusion_gym.agents.sb3")
    with pytest.raises(ImportError, match=r"pip install 'diffusion-denoise-gym\[sb3\]'"):
        importlib.import_module("diffusion_gym.agents.sb3")


def test_policy_needs_a_denoising_environment(make_env):
    with pytest.raises(ValueError, match="is not that of a denoising environment, which CFGUNetPolicy needs"):
        PPO("CFGUNetPolicy", "Pendulum-v1")
    with pytest.raises(ValueError, match="policy_kwargs has no 'model'; pass policy_kwargs="):
        PPO("CFGUNetPolicy", SB3VecEnv(make_env(2)))
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


@pytest.mark.parametrize("make", [ddpo_is, ddpo_sf, ddpo])
def test_rollouts_must_be_whole_episodes(make_env, make):
    with pytest.raises(ValueError, match="n_steps=4 must be a multiple of T=3"):
        make(make_env(2, num_inference_steps=T), n_steps=4)


@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_sb3s_own_algorithms_stop_on_broken_episodes(make_env, algorithm):
    env = SB3VecEnv(make_env(2, num_inference_steps=T))
    model = algorithm("CFGUNetPolicy", env, n_steps=4, policy_kwargs=policy_kwargs(env))
    with pytest.raises(ValueError, match="n_steps must be a multiple of T=3: the rollout ended within an episode"):
        model.learn(8)


def test_scaled_observations_and_actions_are_refused(make_env):
    env = SB3VecEnv(make_env(2, num_inference_steps=T))
    for make in (ddpo_is, ddpo):
        with pytest.raises(ValueError, match="norm_obs=True.*use norm_obs=False"):
            make(VecNormalize(env))
    own = PPO("CFGUNetPolicy", VecNormalize(env), n_steps=T, policy_kwargs=policy_kwargs(env))
    with pytest.raises(ValueError, match="something normalises observations"):
        own.learn(2 * T)
    ddpo_is(VecNormalize(env, norm_obs=False, gamma=1.0)).learn(2 * T)  # rewards may be
    scaled = gym.wrappers.vector.RescaleAction(make_env(2, output="numpy"), -1.0, 1.0)
    with pytest.raises(ValueError, match="action_space=.* is not that of model=.*; take wrappers off that scale"):
        ddpo_is(scaled)


def test_other_values_that_are_refused(make_env):
    env = make_env(2, num_inference_steps=T)
    for options, message in (
        ({"batch_size": 4}, "batch_size=4 must be a multiple of T=3"),
        ({"trained_steps": (0.5, 0.5)}, "trained_steps=.* must be two fractions of T=3"),
        ({"micro_batch_size": 0}, "micro_batch_size=0 must be at least 1"),
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
    with pytest.raises(ValueError, match="eta=0.* makes every denoising step deterministic"):
        ddpo_is(make_env(2, eta=0.0))
