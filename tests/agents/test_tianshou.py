"""Tianshou on the denoising environment: adapter, policy, training, files, and what is refused."""

import importlib
import re
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

pytest.importorskip("tianshou")
from gymnasium.wrappers.vector import ClipAction, RecordEpisodeStatistics, TransformReward
from tianshou.algorithm import PPO
from tianshou.algorithm.modelfree.reinforce import ProbabilisticActorPolicy
from tianshou.data import Batch, Collector, VectorReplayBuffer
from tianshou.env import DummyVectorEnv
from tianshou.trainer import OnPolicyTrainerParams
from tianshou.utils import TensorboardLogger
from tianshou.utils.torch_utils import policy_within_training_step
from torch.distributions import Independent, Normal
from torch.utils.tensorboard import SummaryWriter

from diffusion_gym.agents import DenoisingDistribution, DenoisingPolicy
from diffusion_gym.agents.tianshou import (
    AdamWFactory,
    GuidedActor,
    GuidedGaussian,
    GuidedPolicy,
    TianshouVectorEnv,
    TrajectoryCollector,
    TrajectoryRewards,
    ValueCritic,
    ZeroCritic,
    ddpo_is,
    ddpo_sf,
    load,
    save,
)
from diffusion_gym.storage import load_tensors, save_tensors
from diffusion_gym.wrappers import KLPenaltyVectorEnv, OneStepVectorEnv

ROOT = Path(__file__).parents[2]
T = 3
SHAPE = (4, 4, 4)


@pytest.fixture
def make(make_env):
    """`make(num_envs, **keywords)`: an environment that Tianshou can reset."""

    def made(num_envs=3, **keywords):
        return make_env(num_envs, **{"num_inference_steps": T, "autoreset_mode": "Disabled", **keywords})

    return made


@pytest.fixture
def scored(make):
    """An environment of 4, and the number of pictures that its reward has seen in each call."""
    calls = []

    def counted(images, prompts, metadata):
        calls.append(len(images))
        return images.mean((1, 2, 3))

    return make(4, reward=counted), calls


def noise(number, seed=0):
    return np.random.default_rng(seed).standard_normal((number, *SHAPE)).astype(np.float32)


def same(ours, theirs):
    """Observations: ours a batch, theirs an array of dictionaries."""
    for key in ("prompt", "timestep", "latents"):
        expected = np.stack([row[key] for row in theirs])
        assert ours[key].dtype == expected.dtype
        np.testing.assert_array_equal(ours[key], expected, err_msg=key)


def trained(algorithm, collector, episodes, **changes):
    settings = {
        "training_collector": collector,
        "max_epochs": 1,
        "epoch_num_steps": episodes * T,
        "collection_step_num_env_steps": None,
        "collection_step_num_episodes": episodes,
        "batch_size": None,
        "show_progress": False,
        "verbose": False,
        **changes,
    }
    return algorithm.run_training(OnPolicyTrainerParams(**settings))


# --- the vector environment ------------------------------------------------------------------------------------


def test_it_is_what_tianshou_makes_of_single_environments(make):
    keywords = make(1).spec.kwargs
    keywords = {key: keywords[key] for key in ("model", "reward", "prompts", "num_inference_steps")}
    theirs = DummyVectorEnv([lambda: gym.make("DiffusionDenoise-v0", **keywords)] * 3)
    ours = TianshouVectorEnv(make(3))
    assert len(ours) == len(theirs) and ours.is_async is False
    assert ours.action_space == theirs.action_space and ours.observation_space == theirs.observation_space
    for index in range(3):
        theirs.reset(index, seed=5 + index)
    # The second episode, because theirs has no way to seed all envs differently without a reset.
    ours.seed(5)
    ours.reset()
    order = np.array([2, 0, 1])
    (obs, infos), (obs_, infos_) = ours.reset(order), theirs.reset(order)
    same(obs, obs_)
    assert [info["prompt"] for info in infos] == [info["prompt"] for info in infos_]
    for step in range(2 * T):
        actions = noise(3, step)
        mine, other = ours.step(actions, order), theirs.step(actions, order)
        same(mine[0], other[0])
        np.testing.assert_allclose(mine[1], other[1], rtol=1e-5)  # decoded in batches of another size
        for flag, flag_ in zip(mine[2:4], other[2:4], strict=True):
            assert flag.dtype == np.bool_
            np.testing.assert_array_equal(flag, flag_)
        for info, info_ in zip(mine[4], other[4], strict=True):
            assert info.keys() == info_.keys() - {"image"}  # a picture at every step of the buffer would be too much
            assert info["env_id"] == info_["env_id"] and info["prompt"] == info_["prompt"]
            if "reward_components" in info:
                assert info["reward_components"].keys() == info_["reward_components"].keys()
        if mine[2].all():
            for ids in ([1], [0, 2]):  # by parts, as they end
                same(ours.reset(ids)[0], theirs.reset(ids)[0])
    assert step == 2 * T - 1 and mine[2].all()


def test_a_batch_is_stepped_at_once(make):
    env = make(3)
    calls, step = [], env.unwrapped.step
    env.unwrapped.step = lambda actions: calls.append(len(actions)) or step(actions)
    adapted = TianshouVectorEnv(env)
    adapted.reset()
    adapted.step(noise(3))
    assert calls == [3]


def test_envs_left_out_stay_at_their_start(scored):
    env, calls = scored
    envs = TianshouVectorEnv(env)
    start, infos = envs.reset(seed=1)
    moving = [3, 1]
    for step in range(T):
        obs, rewards, terminated, _, _ = envs.step(noise(2, step), moving)
        np.testing.assert_array_equal(obs.latents, noise(2, step))
    assert terminated.all() and calls == [2]  # what waits is not scored
    np.testing.assert_allclose(rewards, env.unwrapped.model.decode(torch.as_tensor(obs.latents)).mean((1, 2, 3)))
    envs.reset(moving)
    for step in range(T):  # the others begin where they were
        obs, rewards, terminated, _, rows = envs.step(noise(4, step))
        if step == 0:
            assert (obs.timestep == obs.timestep[0]).all()
    assert terminated.all() and calls == [2, 4]
    for index in (0, 2):
        assert rows[index]["prompt"] == infos[index]["prompt"]
        np.testing.assert_array_equal(obs.prompt[index], start.prompt[index])


def test_noise_of_envs_left_out_is_kept(make):
    env = make(2)
    envs = TianshouVectorEnv(env)
    start, _ = envs.reset(seed=1)
    envs.step(noise(1), [0])
    np.testing.assert_array_equal(env.unwrapped._latents[1].numpy(), start.latents[1])
    np.testing.assert_array_equal(env.unwrapped._latents[0].numpy(), noise(1)[0])


@pytest.mark.parametrize("episodes", [3, 4, 6, 9])
def test_collecting_episodes(scored, episodes):
    """Also where Tianshou leaves envs out: too few episodes for them, or too few for another round."""
    env, calls = scored
    algorithm = ddpo_sf(env)
    collector = TrajectoryCollector(algorithm, env, episodes)
    collector.reset(gym_reset_kwargs={"seed": 0})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Tianshou says that envs are idle
        stats = collector.collect(n_episode=episodes)
    assert stats.n_collected_episodes == episodes and stats.n_collected_steps == episodes * T
    assert sum(calls) == episodes  # no reward query is wasted
    assert (stats.lens == T).all()
    batch, _ = collector.buffer.sample(0)
    latents, actions = (part.reshape(episodes, T, *SHAPE) for part in (batch.obs.latents, batch.act))
    np.testing.assert_array_equal(latents[:, 1:], actions[:, :-1])
    np.testing.assert_array_equal(batch.obs_next.latents.reshape(latents.shape)[:, :-1], actions[:, :-1])
    assert len(np.unique(latents[:, 0, 0, 0, 0])) == episodes  # all trajectories are different
    pictures = env.unwrapped.model.decode(torch.as_tensor(actions[:, -1]))
    np.testing.assert_allclose(batch.rew.reshape(episodes, T).sum(1), pictures.mean((1, 2, 3)), rtol=1e-5)


def test_collecting_steps(make):
    env = make(4)
    algorithm = ddpo_sf(env)
    collector = TrajectoryCollector(algorithm, env, episodes=8)
    collector.reset()
    assert collector.collect(n_step=4).n_collected_episodes == 0
    assert collector.collect(n_step=4 * (2 * T - 1)).n_collected_episodes == 8  # goes on where it was
    algorithm.rewards.normalize(collector.buffer.sample(0)[0])


def test_seeds_count_once(make):
    envs = TianshouVectorEnv(make(2))
    assert envs.seed([3, 9]) == [[3], [9]]
    one, two = envs.reset([1])[0].latents, envs.reset([0])[0].latents
    again = envs.reset()[0].latents
    envs.seed([3, 9])
    np.testing.assert_array_equal(envs.reset()[0].latents, np.concatenate([two, one]))
    assert not np.array_equal(again, np.concatenate([two, one]))
    np.testing.assert_array_equal(envs.reset(seed=[3, 9])[0].latents, np.concatenate([two, one]))


def test_attributes_and_pictures(make):
    env = make(2, render_mode="rgb_array")
    envs = TianshouVectorEnv(env)
    envs.reset()
    assert envs.get_env_attr("horizon", [1]) == [T]
    envs.set_env_attr("note", "kept")
    assert env.unwrapped.note == "kept"
    assert [frame.dtype for frame in envs.render()] == [np.uint8] * 2
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        envs.get_env_attr("nonsense")
    with pytest.raises(ValueError, match="share 'note'"):
        envs.set_env_attr("note", 1, [0])
    envs.close()
    assert env.closed
    with pytest.raises(AssertionError, match="after close"):
        envs.reset()


def test_gymnasium_wrappers_stay_below(make):
    envs = TianshouVectorEnv(RecordEpisodeStatistics(make(2, output="numpy")))
    envs.reset()
    for step in range(T):
        infos = envs.step(noise(2, step))[4]
    assert [info["episode"]["l"] for info in infos] == [T, T]


def test_kl_penalty_by_the_environment(make, make_policy):
    """RLHF's way, for algorithms whose loss one does not want to change."""
    env = make(2)
    policy = make_policy(env, scale=0.2)
    penalised = KLPenaltyVectorEnv(env, policy, beta=0.5)
    algorithm = ddpo_is(penalised, GuidedPolicy(GuidedActor(policy)))
    collector = TrajectoryCollector(algorithm, penalised, episodes=2)
    collector.reset()
    collector.collect(n_episode=2)
    batch, _ = collector.buffer.sample(0)
    own, reference = policy.distribution(batch.obs), policy.reference_distribution(batch.obs)
    kl = ((own.mean - reference.mean) ** 2 / (2 * own.std**2)).sum((1, 2, 3)).detach().numpy()
    pictures = env.unwrapped.model.decode(torch.as_tensor(batch.act[T - 1 :: T])).mean((1, 2, 3)).numpy()
    paid = np.zeros(2 * T)
    paid[T - 1 :: T] = pictures
    assert kl.max() > 0.01
    np.testing.assert_allclose(batch.rew, paid - 0.5 * kl, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(batch.info.kl, kl, rtol=1e-3)


def test_wrong_environments(make, make_env):
    for env in (make_env(2), make_env(2, autoreset_mode="NextStep")):
        with pytest.raises(ValueError, match="autoreset_mode='Disabled'"):
            TianshouVectorEnv(env)
    for env in (gym.make("CartPole-v1"), gym.make_vec("CartPole-v1", num_envs=2), None):
        with pytest.raises(ValueError, match="no denoising"):
            TianshouVectorEnv(env)
        with pytest.raises(ValueError, match="no denoising"):
            ddpo_sf(env)
    with pytest.raises(ValueError, match="single_observation_space="):
        TianshouVectorEnv(OneStepVectorEnv(make(2)))
    with pytest.raises(ValueError, match="single_action_space=.*clips"):
        TianshouVectorEnv(ClipAction(make(2, output="numpy")))


def test_wrong_calls(make):
    envs = TianshouVectorEnv(make(3))
    envs.reset()
    with pytest.raises(ValueError, match="2 actions for the 3 envs"):
        envs.step(noise(2))
    with pytest.raises(ValueError, match=r"id=\[1, 1\]"):
        envs.step(noise(2), [1, 1])
    with pytest.raises(ValueError, match=r"id=\[3\]"):
        envs.reset([3])
    with pytest.raises(TypeError, match="seed and options, not speed"):
        envs.reset(speed=1)
    with pytest.raises(ValueError, match="lists 2 seeds for 3"):
        envs.seed([1, 2])
    envs.step(noise(3))
    with pytest.raises(ValueError, match=r"env \[0, 2\] out within an episode"):
        envs.step(noise(1), [1])
    short = TianshouVectorEnv(make(3, num_inference_steps=1))
    short.reset()
    with pytest.raises(ValueError, match="multiple of num_envs=3"):
        short.step(noise(1), [1])


def test_rewards_that_are_not_finite(make):
    envs = TianshouVectorEnv(TransformReward(make(2, num_inference_steps=1), lambda r: r / torch.tensor([0.0, 1.0])))
    envs.reset()
    with pytest.raises(ValueError, match=r"reward of env \[0\] is NaN or infinite"):
        envs.step(noise(2))


# --- the distribution and the policy ----------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gaussian_is_pytorchs(reduction):
    generator = torch.Generator().manual_seed(0)
    mean, actions = torch.randn(2, 5, *SHAPE, generator=generator)
    std = torch.rand(5, 1, 1, 1, generator=generator) + 0.1
    ours = GuidedGaussian(DenoisingDistribution(mean, std, reduction))
    theirs = Independent(Normal(mean, std.expand_as(mean)), 3)
    scale = 1 if reduction == "sum" else 64
    torch.testing.assert_close(ours.log_prob(actions), theirs.log_prob(actions) / scale)
    torch.testing.assert_close(ours.entropy(), theirs.entropy() / scale)
    assert (ours.batch_shape, ours.event_shape) == (theirs.batch_shape, theirs.event_shape)
    assert torch.equal(ours.mode, mean) and torch.equal(ours.mean, mean)
    torch.testing.assert_close(ours.stddev, std.reshape(5, 1))
    torch.testing.assert_close(ours.variance, std.reshape(5, 1) ** 2)
    drawn = ours.sample((2000,))
    assert drawn.shape == (2000, 5, *SHAPE)
    torch.testing.assert_close(drawn.mean(0), mean, rtol=0, atol=0.15)
    torch.testing.assert_close(drawn.std(0), std.expand_as(mean), rtol=0.1, atol=0)


def test_gaussian_of_a_deterministic_step():
    gaussian = GuidedGaussian(DenoisingDistribution(torch.ones(1, *SHAPE), torch.zeros(1, 1, 1, 1), "sum"))
    assert float(gaussian.log_prob(torch.zeros(1, *SHAPE))) == float(gaussian.entropy()) == 0
    assert torch.equal(gaussian.sample(), gaussian.mean)


def test_policy_acts_as_the_native_one(make, make_policy):
    env = make(3)
    policy = make_policy(env)
    guided = GuidedPolicy(GuidedActor(policy))
    obs, infos = TianshouVectorEnv(env).reset(seed=0)
    torch.manual_seed(4)
    result = guided(Batch(obs=obs, info={}))
    native = policy.distribution({key: torch.as_tensor(value) for key, value in obs.items()})
    torch.manual_seed(4)
    torch.testing.assert_close(result.act, native.sample())
    torch.testing.assert_close(result.dist.log_prob(result.act), native.log_prob(result.act))
    far = 900 * np.ones((1, *SHAPE), np.float32)
    np.testing.assert_array_equal(guided.map_action(far), far)


def test_deterministic_evaluation_gives_the_mean(make, make_policy):
    env = make(2)
    policy = make_policy(env)
    guided = GuidedPolicy(GuidedActor(policy), deterministic_eval=True)
    collector = Collector(guided, TianshouVectorEnv(env), VectorReplayBuffer(4 * T, 2))
    collector.reset()
    found = {}
    for training in (False, True):
        with policy_within_training_step(guided, enabled=training):
            collector.collect(n_episode=2)
        batch, _ = collector.buffer.sample(0)
        mean = policy.distribution(batch.obs).mean.detach().numpy()
        found[training] = np.abs(batch.act - mean).max()
        collector.reset_buffer()
    assert found[False] < 1e-5 < 1e-2 < found[True]


def test_rollouts_keep_no_activations(make, make_policy):
    """Tianshou's collectors leave autograd on."""
    env = make(2)
    algorithm = ddpo_sf(env, GuidedPolicy(GuidedActor(make_policy(env))))
    seen = []
    collector = TrajectoryCollector(
        algorithm, env, 2, on_step_hook=lambda action, rollout: seen.append(action.dist.mean.requires_grad)
    )
    collector.reset()
    collector.collect(n_episode=2)
    assert seen == [False] * T
    batch, _ = collector.buffer.sample(0)
    assert algorithm.policy.train()(batch).dist.mean.requires_grad
    assert not algorithm.policy.denoising.unet.training  # dropout would break ratio = 1


def test_options_of_the_policy(make):
    policy = GuidedPolicy.from_env(
        make(2), trainable="full", micro_batch_size=2, mixed_precision="bf16", cfg_training=False
    )
    inner = policy.denoising
    assert (inner.trainable, inner.mixed_precision, inner.cfg_training) == ("full", "bf16", False)
    assert policy.actor.micro_batch_size == 2
    assert GuidedPolicy.from_env(make(2), lora_rank=2).denoising.lora_rank == 2


@pytest.mark.parametrize(
    "change, named",
    [
        ({"action_scaling": True}, "action_scaling=True"),
        ({"action_bound_method": "clip"}, "action_bound_method='clip'"),
        ({"action_bound_method": "tanh"}, "action_bound_method='tanh'"),
    ],
)
def test_actions_are_not_changed(make, change, named):
    env = make(2)
    with pytest.raises(ValueError, match=named):
        GuidedPolicy.from_env(env, **change)
    for name, value in change.items():  # switched on later
        for build in (ddpo_sf, ddpo_is):
            policy = GuidedPolicy.from_env(env)
            setattr(policy, name, value)
            with pytest.raises(ValueError, match=named):
                build(env, policy)


def test_other_policies_are_refused(make):
    env = make(2)
    actor = GuidedPolicy.from_env(env).actor
    spaces = {"action_space": env.single_action_space, "observation_space": env.single_observation_space}
    off = {"action_scaling": False, "action_bound_method": None}
    builders = (ddpo_sf, ddpo_is, lambda env, policy: TrajectoryCollector(policy, env, 2))
    for policy, message in (
        (ProbabilisticActorPolicy(actor=actor, dist_fn=GuidedGaussian, **spaces), "action_scaling=True"),
        (ProbabilisticActorPolicy(actor=actor, dist_fn=lambda gaussian: None, **off, **spaces), "dist_fn=.*squashed"),
        (
            ProbabilisticActorPolicy(actor=torch.nn.Linear(1, 1), dist_fn=Normal, **spaces),
            "policy=ProbabilisticActorPolicy is not a guided UNet's",
        ),
    ):
        for build in builders:
            with pytest.raises(ValueError, match=message):
                build(env, policy)


def test_wrong_options(make):
    env = make(2)
    with pytest.raises(ValueError, match="eta=0"):
        ddpo_sf(make(2, eta=0.0))
    with pytest.raises(ValueError, match="mixed_precision='fp16'.*loss scaling"):
        GuidedPolicy.from_env(env, mixed_precision="fp16")
    with pytest.raises(ValueError, match="micro_batch_size=-1"):
        GuidedPolicy.from_env(env, micro_batch_size=-1)
    with pytest.raises(ValueError, match="value_network=True is not trained"):
        ddpo_is(env, value_network=True)
    with pytest.raises(ValueError, match="recompute_advantage=True"):
        ddpo_is(env, recompute_advantage=True)
    for build in (ddpo_sf, ddpo_is):
        with pytest.raises(ValueError, match="normalization='running'"):
            build(env, normalization="running")
        with pytest.raises(ValueError, match="advantage_clip=0"):
            build(env, advantage_clip=0)
        with pytest.raises(ValueError, match="learning_rate=-1"):
            build(env, learning_rate=-1)
    algorithm = ddpo_sf(env)
    with pytest.raises(ValueError, match="episodes=0"):
        TrajectoryCollector(algorithm, env, 0)
    with pytest.raises(ValueError, match="env has sampler="):
        TrajectoryCollector(algorithm, make(2, guidance_scale=2.0), 2)
    with pytest.raises(ValueError, match="autoreset_mode"):
        TrajectoryCollector(algorithm, make(2, autoreset_mode="SameStep"), 2)


# --- rewards, critics --------------------------------------------------------------------------------------------


def rollout(rewards, prompts, horizon=T, step_rewards=0.0):
    """A batch of whole trajectories without a policy behind it."""
    number = len(rewards)
    latents = noise(number * (horizon + 1)).reshape(number, horizon + 1, *SHAPE)
    rew = np.full((number, horizon), step_rewards)
    rew[:, -1] += rewards
    done = np.zeros((number, horizon), dtype=bool)
    done[:, -1] = True
    return Batch(
        obs=Batch(latents=latents[:, :-1].reshape(-1, *SHAPE)),
        act=latents[:, 1:].reshape(-1, *SHAPE),
        rew=rew.ravel(),
        done=done.ravel(),
        info=Batch(prompt=np.repeat(np.array(prompts, dtype=object), horizon)),
    )


def test_rewards_by_prompt(make):
    policy = DenoisingPolicy.from_env(make(2))
    rewards = TrajectoryRewards(policy, "prompt", statistics_min_count=2)
    batch = rollout([1.0, 3.0, 10.0, 4.0], ["a", "a", "b", "c"], step_rewards=0.5)
    rewards.normalize(batch)
    totals = np.array([1.0, 3.0, 10.0, 4.0]) + T * 0.5
    expected = np.array([-1.0, 1.0, *(totals[2:] - totals.mean()) / totals.std()])
    np.testing.assert_allclose(batch.rew.reshape(4, T)[:, -1], expected)
    assert not batch.rew.reshape(4, T)[:, :-1].any()


def test_rewards_as_they_are(make):
    rewards = TrajectoryRewards(DenoisingPolicy.from_env(make(2)), "none")
    batch = rollout([1.0, 3.0], ["a", "b"], step_rewards=0.5)
    rewards.normalize(batch)
    np.testing.assert_array_equal(batch.rew, [0.5, 0.5, 1.5, 0.5, 0.5, 3.5])


def test_rollouts_of_parts(make):
    rewards = TrajectoryRewards(DenoisingPolicy.from_env(make(2)), "batch")
    whole = rollout([1.0, 3.0], ["a", "b"])
    for part in (whole[:-1], whole[1:], whole[1:-2]):  # cut at the end, at the beginning, at both
        with pytest.raises(ValueError, match=f"not whole trajectories of T={T} steps"):
            rewards.normalize(part)
    for name, value in (("act", np.clip(whole.act, -1, 1)), ("obs", Batch(latents=whole.obs.latents * 0.5))):
        with pytest.raises(ValueError, match="not the actions before them"):
            rewards.normalize(Batch({**dict(whole.items()), name: value}))


@pytest.mark.parametrize("build", [ddpo_sf, ddpo_is])
def test_steps_that_are_not_whole_episodes(make, build):
    env = make(2)
    algorithm = build(env)
    with pytest.raises(ValueError, match=f"multiple of num_envs \\* {T} steps"):
        trained(
            algorithm,
            TrajectoryCollector(algorithm, env, 4),
            4,
            collection_step_num_episodes=None,
            collection_step_num_env_steps=2 * T + 2,
        )
    for changes in ({}, {"collection_step_num_episodes": None, "collection_step_num_env_steps": 6 * T}):
        with pytest.raises(ValueError, match=f"{3 * T} steps of each env do not fit .* room for {T}; make"):
            trained(algorithm, TrajectoryCollector(algorithm, env, 2), 6, **changes)


def test_critics(make, make_policy):
    env = make(3)
    policy = make_policy(env)
    obs, _ = TianshouVectorEnv(env).reset()
    assert torch.equal(ZeroCritic(policy.device)(obs), torch.zeros(3, 1))
    critic = ValueCritic(policy)
    expected = critic.network(
        torch.as_tensor(obs.latents),
        torch.as_tensor(obs.timestep[:, 0]),
        policy.embed(torch.as_tensor(obs.prompt)),
    )
    torch.testing.assert_close(critic(obs), expected[:, None])
    assert {name.split(".")[0] for name, _ in critic.named_parameters()} == {"network"}


def test_a_value_network_is_a_baseline(make):
    env = make(2)
    algorithm = ddpo_is(env, value_network=True, vf_coef=0.5, learning_rate=1e-3, normalization="none")
    collector = TrajectoryCollector(algorithm, env, 4)
    collector.reset()
    collector.collect(n_episode=4)
    batch, indices = collector.buffer.sample(0)
    rewards = np.repeat(batch.rew[T - 1 :: T], T)
    before = algorithm.critic(batch.obs).detach().flatten()
    prepared = algorithm._preprocess_batch(batch, collector.buffer, indices)
    torch.testing.assert_close(prepared.adv, torch.as_tensor(rewards).float() - before, rtol=1e-4, atol=1e-5)
    with policy_within_training_step(algorithm.policy):
        algorithm.update(buffer=collector.buffer, batch_size=None, repeat=3)
    after = algorithm.critic(batch.obs).detach().flatten()
    errors = [float(((values - torch.as_tensor(rewards)) ** 2).mean()) for values in (before, after)]
    assert errors[1] < errors[0]


# --- training and files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [ddpo_sf, ddpo_is])
def test_training(make, tmp_path, build):
    """Tianshou's trainer with its logger, test episodes and both ways to save."""
    env = make(2)
    torch.manual_seed(0)
    algorithm = build(env, learning_rate=1e-3, statistics_min_count=2)
    start = {name: value.detach().clone() for name, value in algorithm.policy.denoising.trainable_parameters().items()}
    logger = TensorboardLogger(SummaryWriter(str(tmp_path)), training_interval=1, update_interval=1, save_interval=1)
    saved = []
    info = trained(
        algorithm,
        TrajectoryCollector(algorithm, env, 4),
        4,
        max_epochs=2,
        test_collector=TrajectoryCollector(algorithm, make(2), 3),
        test_step_num_episodes=3,
        logger=logger,
        save_best_fn=lambda best: saved.append(save(best, tmp_path / "best.safetensors")),
        save_checkpoint_fn=lambda epoch, *steps: save(algorithm, tmp_path / f"{epoch}.safetensors"),
    )
    assert info.update_step == 2 and info.train_step == 8 * T
    logged = TensorboardLogger.restore_logged_data(str(tmp_path))
    assert len(logged["update"]["loss"]["mean"]) == len(logged["training"]["returns_stat"]["mean"]) == 2
    assert list(logged["test"]["n_collected_episodes"]) == [3, 3, 3]
    assert len(logged["training"]["pred_dist_std_array_stat"]) == 1  # sigma once, not for each dimension
    assert saved and {path.name for path in tmp_path.glob("*.safetensors")} == {
        *("best.safetensors", "1.safetensors", "2.safetensors")
    }
    moved = algorithm.policy.denoising.trainable_parameters()
    assert any(not torch.equal(value, start[name]) for name, value in moved.items())


@pytest.mark.parametrize("build", [ddpo_sf, lambda env, **more: ddpo_is(env, value_network=True, vf_coef=0.5, **more)])
def test_saved_training_goes_on(make, tmp_path, build):
    env = make(2)
    one, two = (build(env, learning_rate=1e-2, statistics_min_count=2) for _ in range(2))
    collector = TrajectoryCollector(one, env, 4)
    collector.reset()
    collector.collect(n_episode=4)

    def updated(algorithm):
        np.random.seed(0)  # Tianshou's order of the transitions
        with policy_within_training_step(algorithm.policy):
            algorithm.update(buffer=collector.buffer, batch_size=None, repeat=1)

    updated(one)
    path = tmp_path / "weights.safetensors"
    assert save(one, path) == str(path)
    stored = {name.split(".", 1)[1] for name in load_tensors(path) if name.startswith("policy.")}
    assert stored == set(one.policy.denoising.trainable_parameters())  # not the UNet
    load(two, path)
    for algorithm in (one, two):  # moments and statistics count here
        updated(algorithm)
    assert two.rewards.statistics.state() == one.rewards.statistics.state()
    theirs = dict(one.named_parameters())
    for name, value in two.named_parameters():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=0, msg=name)


def test_files_of_others(make, tmp_path):
    env = make(2)
    path = tmp_path / "weights.safetensors"
    save(ddpo_sf(env), path)
    with pytest.raises(ValueError, match="weights of another policy; check the model, trainable, lora_rank"):
        load(ddpo_sf(env, GuidedPolicy.from_env(env, lora_rank=2)), path)
    with pytest.raises(ValueError, match="weights of another policy"):
        load(ddpo_is(env, value_network=True, vf_coef=0.5), path)
    save_tensors(path, {"a": torch.zeros(1)})
    with pytest.raises(ValueError, match="no file of diffusion_gym.agents.tianshou.save"):
        load(ddpo_sf(env), path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        load(ddpo_sf(env), path)


def test_tianshous_own_ppo_takes_the_policy(make):
    """Without the helpers: its settings are then the user's own."""
    env = make(2)
    policy = GuidedPolicy.from_env(env)
    algorithm = PPO(
        policy=policy, critic=ZeroCritic(policy.denoising.device), optim=AdamWFactory(1e-3), gamma=1.0, gae_lambda=1.0
    )
    trained(algorithm, Collector(algorithm, TianshouVectorEnv(env), VectorReplayBuffer(2 * T, 2)), 2)


@pytest.mark.gpu
@pytest.mark.parametrize("build", [ddpo_sf, ddpo_is])
def test_training_on_a_gpu(make, exact_end_pipeline, tmp_path, build):
    env = make(2, device="cuda", model=str(exact_end_pipeline))
    algorithm = build(env, GuidedPolicy.from_env(env, micro_batch_size=2), learning_rate=1e-3)
    start = {name: value.detach().clone() for name, value in algorithm.policy.denoising.trainable_parameters().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Tianshou says that envs are idle
        trained(algorithm, TrajectoryCollector(algorithm, env, 3), 3, max_epochs=2)
    moved = algorithm.policy.denoising.trainable_parameters()
    assert all(value.device.type == "cuda" for value in moved.values())
    assert any(not torch.equal(value, start[name]) for name, value in moved.items())
    load(algorithm, save(algorithm, tmp_path / "weights.safetensors"))


def test_the_page_runs(tmp_path, monkeypatch):
    """Every block of docs/tianshou.md in order, with fewer environments and steps."""
    page = (ROOT / "docs" / "tianshou.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    assert len(blocks) == 5
    monkeypatch.chdir(tmp_path)
    scope = {}
    for block in blocks:
        for large, small in (("=64", "=4"), ("64 * T", "4 * T"), ("32 * T", "2 * T"), ("T = 10", "T = 3")):
            block = block.replace(large, small)
        exec(block, scope)
    assert len(scope["stats"].returns) == 4 and list((tmp_path / "logs").iterdir())
    assert (tmp_path / "run.safetensors").exists() and (tmp_path / "model").is_dir()
    for target in re.findall(r"\]\(([^)#]+)", page):
        assert target.startswith("http") or (ROOT / "docs" / target).exists(), target


def test_tianshou_that_is_not_installed(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("diffusion_gym.agents.tianshou")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tianshou", None)
    with pytest.raises(ImportError, match=r"pip install 'diffusion-denoise-gym\[tianshou\]'"):
        importlib.import_module("diffusion_gym.agents.tianshou")
