"""`GuidedPolicy`, its distribution and the critics."""

import numpy as np
import pytest
import torch

pytest.importorskip("tianshou")
from tianshou.algorithm.modelfree.reinforce import ProbabilisticActorPolicy
from tianshou.data import Batch, Collector, VectorReplayBuffer
from tianshou.utils.torch_utils import policy_within_training_step
from torch.distributions import Independent, Normal

from diffusion_gym.agents import DenoisingDistribution
from diffusion_gym.agents.tianshou import (
    GuidedActor,
    GuidedGaussian,
    GuidedPolicy,
    TianshouVectorEnv,
    TrajectoryCollector,
    ValueCritic,
    ZeroCritic,
    ddpo_is,
    ddpo_sf,
)

T = 3
SHAPE = (4, 4, 4)


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
