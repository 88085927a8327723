"""Parity: on the same trajectories and weights, Stable-Baselines3 and the native agents compute the same."""

import copy
import math

import numpy as np
import pytest
import torch

pytest.importorskip("stable_baselines3")
from stable_baselines3.common.logger import configure

from diffusion_gym.agents.algorithms import AGENTS
from diffusion_gym.agents.sb3 import DDPOPPO, ddpo_is, ddpo_sf

T = 4


def settled(model, policy):
    """An SB3 model with the weights of a native policy, ready to train without `learn`."""
    model.policy.actor.load_state_dict(policy.state_dict())
    model.set_logger(configure(None, []))
    model.max_grad_norm = math.inf
    return model


def filled(model, trajectories, rewards=None):
    """Put native trajectories into SB3's rollout buffer, as its `collect_rollouts` would."""
    buffer, number = model.rollout_buffer, len(trajectories)
    samples = torch.arange(number)
    buffer.reset()
    for step in range(T):
        states = trajectories.states(samples, torch.full((number,), step))
        last = trajectories.rewards.numpy() if step == T - 1 else np.zeros(number, np.float32)
        buffer.add(
            {key: value.numpy() for key, value in states.items()},
            trajectories.latents[step + 1].numpy(),
            last if rewards is None else rewards[step],
            np.full(number, step == 0),
            torch.zeros(number, 1),
            trajectories.log_probs[step],
        )
    buffer.compute_returns_and_advantage(torch.zeros(number, 1), np.ones(number, bool))
    return buffer


def gradient(optimizer, parameters, train):
    """The gradient at the first optimiser step of `train`, as one vector; no step is taken."""
    seen = []

    def step(*_, **__):
        seen.append(torch.cat([parameter.grad.flatten() for parameter in parameters]).clone())

    kept, optimizer.step = optimizer.step, step
    try:
        train()
    finally:
        optimizer.step = kept
    return seen[0]


def gradient_of_native(agent, trajectories):
    update = lambda: agent.update(trajectories, np.random.default_rng(0))  # noqa: E731
    return gradient(agent.optimizer.adam, agent.parameters, update)


def gradient_of_sb3(model):
    return gradient(model.policy.optimizer, list(model.policy.actor.trainable_parameters().values()), model.train)


def agree(one, other, ratio=1e-3):
    assert one.norm() > 0
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) >= 0.9999
    assert abs(one.norm() / other.norm() - 1) <= ratio


def prepared(make_env, make_agent, roll, perturb, name, number, moved, env_options=None, **options):
    """Environment, trajectories, and the native agent whose weights have `moved` since they were sampled."""
    env = make_env(number, num_inference_steps=T, **(env_options or {}))
    options = {"batch_size": number, "max_grad_norm": 1e9, **options}
    agent = make_agent(env, agent=AGENTS[name], **options)
    trajectories = roll(env, agent.policy, seed=3)
    perturb(agent.policy, moved, seed=1)
    return env, agent, trajectories


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("make", [ddpo_is, ddpo_sf])
def test_log_probs_and_advantages(make_env, make_agent, roll, perturb, make, reduction):
    options = {"log_prob_reduction": reduction}
    env, agent, trajectories = prepared(make_env, make_agent, roll, perturb, "ddpo_is", 6, 0.0, options)
    model = settled(make(env), agent.policy)
    buffer = filled(model, trajectories)
    (sample,) = buffer.get(None)
    with torch.no_grad():
        _, log_prob, _ = model.policy.evaluate_actions(sample.observations, sample.actions)
        native = agent.policy(sample.observations, sample.actions.view(-1, *env.single_action_space.shape))
    torch.testing.assert_close(log_prob, native, rtol=0, atol=1e-6)
    torch.testing.assert_close(log_prob, sample.old_log_prob, rtol=1e-5, atol=1e-5)  # scored in batches of 6, not 24
    # Gamma 1, lambda 1 and no values: the advantage is the reward, at each of the T steps.
    swapped = buffer.advantages.reshape(6, T)
    np.testing.assert_allclose(swapped, trajectories.rewards.numpy()[:, None].repeat(T, 1), rtol=1e-6)
    # SB3 normalises by the deviation of a sample, n - 1, over the transitions; the native agents by that of the batch.
    number = 6 * T
    normalized = (sample.advantages - sample.advantages.mean()) / (sample.advantages.std() + 1e-8)
    native = torch.as_tensor(agent.advantages(trajectories))
    expected = torch.sort(native.repeat_interleave(T)).values * math.sqrt((number - 1) / number)
    torch.testing.assert_close(torch.sort(normalized.double()).values, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("name", ["ddpo_is", "ddpo_sf"])
def test_gradient_of_sb3s_own_train(make_env, make_agent, roll, perturb, name, trainable):
    """SB3's PPO.train and A2C.train as they are, with their own normalisation, against the native agents."""
    moved = {"lora": 0.02, "full": 0.003}[trainable] if name == "ddpo_is" else 0.0
    number = 160  # where n - 1 and n are the same to 1e-3
    options = {"trainable": trainable, "micro_batch_size": number * T}
    env, agent, trajectories = prepared(make_env, make_agent, roll, perturb, name, number, moved, **options)
    if name == "ddpo_is":
        agent.config = type(agent.config)(**{**vars(agent.config), "clip_range": 2e-3})
        model = ddpo_is(env, clip_range=2e-3, batch_size=number * T, policy_kwargs={"trainable": trainable})
    else:
        model = ddpo_sf(env, policy_kwargs={"trainable": trainable})
    settled(model, agent.policy)
    filled(model, trajectories)
    agree(gradient_of_sb3(model), gradient_of_native(agent, trajectories))
    if name == "ddpo_is":  # some ratios are beyond the clip range, some are not
        assert 0.05 < model.logger.name_to_value["train/clip_fraction"] < 0.95


@pytest.mark.parametrize("make", [ddpo_is, ddpo_sf])
def test_gradient_with_the_native_advantages(make_env, make_agent, roll, perturb, make):
    """With SB3's normalisation off and rewards normalised before, the two agree to rounding."""
    name = make.__name__
    env, agent, trajectories = prepared(make_env, make_agent, roll, perturb, name, 5, 0.0)
    model = settled(make(env, normalize_advantage=False, policy_kwargs={"micro_batch_size": 3}), agent.policy)
    rewards = np.zeros((T, 5), np.float32)
    rewards[-1] = agent.advantages(trajectories)
    filled(model, trajectories, rewards)
    agree(gradient_of_sb3(model), gradient_of_native(agent, trajectories), 1e-4)


@pytest.mark.parametrize("part", [(0.0, 1.0), (0.25, 0.75), (0.5, 1.0)])
@pytest.mark.parametrize("make", [ddpo_is, ddpo_sf])
def test_gradient_of_a_part_of_the_steps(make_env, make_agent, roll, perturb, make, part, exact_end_pipeline):
    """SB3's own `train` on the trained steps alone, without the deterministic last one."""
    model_options = {"model": str(exact_end_pipeline)}
    arguments = (make_env, make_agent, roll, perturb, make.__name__, 5, 0.0, model_options)
    env, agent, trajectories = prepared(*arguments, trained_steps=part)
    model = settled(make(env, trained_steps=part, normalize_advantage=False), agent.policy)
    rewards = np.zeros((T, 5), np.float32)
    rewards[-1] = agent.advantages(trajectories)
    filled(model, trajectories, rewards)
    agree(gradient_of_sb3(model), gradient_of_native(agent, trajectories), 1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"normalization": "batch"},
        {"normalization": "prompt", "statistics_min_count": 2},
        {"normalization": "none", "advantage_clip": 0.3},
        {"trained_steps": (0.25, 0.75)},
        {"kl_weight": 2.0, "kl_form": "closed_form"},
        {"kl_weight": 2.0, "kl_form": "squared_log_ratio"},
        {"kl_weight": 2.0, "kl_form": "unscaled"},
    ],
)
def test_gradient_of_ddpoppo(make_env, make_agent, roll, perturb, options, exact_end_pipeline):
    """DDPOPPO is exact at any size, with a deterministic last step, in micro-batches that divide nothing."""
    name = "ddpo_iskl" if "kl_form" in options else "ddpo_is"
    options = {"normalization": "batch", "clip_range": 5e-3, "micro_batch_size": 5, **options}
    model_options = {"model": str(exact_end_pipeline)}
    env, agent, trajectories = prepared(make_env, make_agent, roll, perturb, name, 6, 0.05, model_options, **options)
    assert len(agent.policy.stochastic_steps) == T - 1
    model = settled(DDPOPPO("CFGUNetPolicy", env, **options), agent.policy)
    for _ in range(2):  # twice, so that the running statistics are used
        filled(model, trajectories)
        ours, theirs = gradient_of_sb3(model), gradient_of_native(agent, trajectories)
    agree(ours, theirs, 1e-4)
    assert 0 < model.logger.name_to_value["train/clip_fraction"] < 1


@pytest.mark.parametrize("buffer", ["DDPOPPO", "ddpo_is"])
def test_rollout_is_the_native_rollout(make_env, make_policy, roll, buffer):
    """SB3's `collect_rollouts` samples bit for bit what the native rollout does: nothing scales, rounds or clips."""
    policy = make_policy(make_env(3, num_inference_steps=T))
    expected = roll(make_env(3, num_inference_steps=T), policy, seed=7)
    env = make_env(3, num_inference_steps=T)
    model = settled(DDPOPPO("CFGUNetPolicy", env) if buffer == "DDPOPPO" else ddpo_is(env), policy)
    model.env.seed(7)
    _, callback = model._setup_learn(3 * T, None)
    torch.manual_seed(7)  # the native rollout's generator, here the global one
    model.collect_rollouts(model.env, callback, model.rollout_buffer, T)
    if buffer == "DDPOPPO":
        latents, log_probs = model.rollout_buffer.latents, model.rollout_buffer.step_log_probs
        rewards = model.rollout_buffer.step_rewards[-1]
        assert torch.equal(latents, expected.latents) and torch.equal(model.rollout_buffer.tokens, expected.tokens)
    else:
        rollout = model.rollout_buffer
        actions = torch.as_tensor(rollout.actions).view(T, 3, 4, 4, 4)
        assert torch.equal(actions, expected.latents[1:])
        assert torch.equal(torch.as_tensor(rollout.observations["latents"]), expected.latents[:-1])
        log_probs, rewards = torch.as_tensor(rollout.log_probs), torch.as_tensor(rollout.rewards[-1])
    torch.testing.assert_close(log_probs, expected.log_probs, rtol=0, atol=1e-6)
    assert torch.equal(rewards, expected.rewards)


def test_training_is_the_native_training(make_env, make_agent, roll):
    """Two iterations of DDPOPPO.learn leave the weights where two native iterations leave them."""
    options = {"learning_rate": 1e-3, "clip_range": 0.2, "statistics_min_count": 2, "micro_batch_size": 64}
    agent = make_agent(make_env(6, num_inference_steps=T), batch_size=6, normalization="prompt", **options)
    model = DDPOPPO("CFGUNetPolicy", make_env(6, num_inference_steps=T), n_epochs=2, **options)
    model.policy.actor.load_state_dict(agent.policy.state_dict())
    agent.config = type(agent.config)(**{**vars(agent.config), "inner_epochs": 2})
    start = copy.deepcopy(agent.policy.trainable_parameters())
    env = make_env(6, num_inference_steps=T)
    for iteration in range(2):
        agent.update(roll(env, agent.policy, seed=iteration), np.random.default_rng(0))
        model.env.seed(iteration)
        model._last_obs = None  # begin with a reset, as the native rollout does
        torch.manual_seed(iteration)
        model.learn(6 * T, reset_num_timesteps=False)
    ours, theirs = model.policy.actor.trainable_parameters(), agent.policy.trainable_parameters()
    way = sum(((theirs[name] - start[name]) ** 2).sum() for name in start).sqrt()
    apart = sum(((theirs[name] - ours[name]) ** 2).sum() for name in start).sqrt()
    assert way > 0 and apart / way < 1e-2  # Adam divides by gradients, which rounding moves where they are near 0
