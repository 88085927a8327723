"""What the agents on finished pictures share: targets of all kinds of networks, the behaviour policy, the noise."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from agent_updates import rewarded, update, weights
from diffusion_gym.agents.algorithms import AGENTS, NFT
from diffusion_gym.agents.averaging import BehaviourOptions, BehaviourPolicy
from diffusion_gym.agents.renoising import squared_error
from diffusion_gym.agents.rollout import collect_many
from diffusion_gym.scheduling import predict_x0
from diffusion_gym.wrappers.one_step import OneStepVectorEnv
from toy_policy import ToyPolicy, toy_batch


@pytest.fixture
def env(make_env):
    return make_env(8, num_inference_steps=3, eta=0.0)


@pytest.mark.parametrize("prediction", ["flow", "epsilon", "v_prediction", "sample"])
def test_a_network_that_predicts_the_target_finds_the_picture(prediction):
    """The inverse of `predict_x0`, for every kind of network."""
    policy = ToyPolicy(prediction)
    batch = toy_batch(policy, [0.0] * 6)
    clean, eps = policy.estimates(batch.target, batch.observation)
    torch.testing.assert_close(clean, batch.clean, rtol=1e-12, atol=1e-12)
    steps = batch.observation["step"]
    signal, noise = (column[steps].view(-1, 1, 1, 1) for column in (policy.table.signal, policy.table.noise))
    torch.testing.assert_close(signal * clean + noise * eps, batch.observation["latents"], rtol=1e-12, atol=1e-12)
    assert not torch.equal(predict_x0(0 * eps, batch.observation["latents"], signal, noise, prediction)[0], clean)


def test_the_behaviour_policy_follows_by_a_decay_that_grows():
    weight = torch.nn.Parameter(torch.zeros(3))
    behaviour = BehaviourPolicy(
        [weight], BehaviourOptions(behaviour_decay=0.5, behaviour_growth=0.2, behaviour_delay=2)
    )
    found, expected = [], 0.0
    for updates, decay in ((1, 0.0), (2, 0.0), (3, 0.2), (4, 0.4), (5, 0.5), (9, 0.5)):
        behaviour.updates = updates
        with torch.no_grad():
            weight.fill_(float(updates))
        behaviour.update()
        expected = decay * expected + (1 - decay) * updates
        found.append(expected)
        assert behaviour.current_decay == pytest.approx(decay)
        torch.testing.assert_close(behaviour.average[0], torch.full((3,), expected))
    assert found[1] == 2.0 and found[2] == pytest.approx(2.8)


def test_it_samples_and_it_is_what_the_update_compares_with(env, make_agent):
    agent = make_agent(env, "full", agent=NFT, batch_size=4, learning_rate=1e-2, behaviour_growth=0.1)
    update(agent, agent.sample(env, 8, (0, 0)))
    other = copy.deepcopy(agent.policy)
    for parameter, average in zip(other.trainable_parameters().values(), agent.behaviour.average, strict=True):
        with torch.no_grad():
            parameter.copy_(average)
    before = weights(agent)
    expected = collect_many(OneStepVectorEnv(env), other, 8, (0, 1))
    rolled = agent.sample(env, 8, (0, 1))
    assert torch.equal(rolled.finished, expected.finished) and torch.equal(weights(agent), before)
    seen, losses = [], agent.losses
    agent.losses = lambda batch: seen.append(batch) or losses(batch)
    update(agent, rewarded(rolled))
    for batch in seen:
        with torch.no_grad():
            torch.testing.assert_close(batch.fixed["behaviour"], other.prediction(batch.observation))
    assert agent.behaviour.updates == 4


def test_each_picture_has_noise_of_its_own_at_each_step(env, make_agent):
    agent = make_agent(env, agent=NFT, batch_size=8, timestep_fraction=0.67)
    seen, losses = [], agent.losses
    agent.losses = lambda batch: seen.append(batch) or losses(batch)
    update(agent, rewarded(agent.sample(env, 8, (0, 0))))
    (batch,) = seen
    noise = batch.target.flatten(1)  # the tiny pipeline predicts the noise
    assert len(noise) == 16 and torch.cdist(noise, noise).add(torch.eye(16) * 9).min() > 0.1
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1


def test_a_sample_without_reward_is_left_out(env, make_agent):
    agent = make_agent(env, agent=NFT, batch_size=8)
    rolled = rewarded(agent.sample(env, 8, (0, 0)))
    rolled.rewards[2] = torch.nan
    metrics = update(agent, rolled)
    assert metrics["samples_dropped"] == 1 and np.isfinite(list(metrics.values())).all()


LEARNERS = {"nft": {}, "awm": {}, "dgpo": {"group_size": 4}, "online_dpo": {"group_size": 4}}


@pytest.mark.parametrize("name", LEARNERS)
def test_the_network_moves_towards_the_pictures_with_high_rewards(env, make_agent, name):
    """Two agents get the same two kinds of pictures and opposite rewards: each predicts its own kind better."""
    pictures = 3 * torch.where(torch.arange(8) % 2 == 0, 1, -1).view(1, -1, 1, 1, 1).expand(1, -1, 4, 4, 4).float()
    errors = []
    for high in (0, 1):
        options = {"batch_size": 8, "inner_epochs": 4, "learning_rate": 3e-3, **LEARNERS[name]}
        agent = make_agent(env, "full", agent=AGENTS[name], **options)
        rewards = (torch.arange(8) % 2 == high).float()
        rolled = replace(agent.sample(env, 8, (0,)), rewards=rewards, prompts=("",) * 8, latents=pictures)
        update(agent, rolled)
        pairs = torch.cartesian_prod(torch.arange(8), torch.arange(3))
        noised = agent.noised(rolled, torch.zeros(8), pairs, seed=1)
        found = agent.evaluated(noised, lambda b, a=agent: squared_error(a.policy.prediction(b.observation), b.target))
        errors.append([found[pairs[:, 0] % 2 == parity].mean() for parity in (0, 1)])
    even, odd = errors
    assert even[0] < 0.99 * odd[0] and odd[1] < 0.99 * even[1]
