"""DPOK's updates of the policy, redone by hand from the rollouts; its options."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from agent_updates import (
    close,
    every_pair,
    gradients,
    log_prob,
    penalties,
    places,
    record,
    rewarded,
    slope,
    transitions,
    update,
    weights,
)
from diffusion_gym.agents.algorithms import DPOK
from dpok_options import ALL, NUMBER

TRAINABLE = ["lora", "full"]


def by_hand(policy, trajectories, pairs, *, alpha=1.0, clip_range=0.2):
    """Mean of -alpha min(ratio A, clipped ratio A) of the given transitions of a rollout; A is the reward."""
    samples, steps = torch.tensor(pairs).unbind(1)
    advantage = trajectories.rewards[samples]
    ratio = (log_prob(policy, *transitions(trajectories, pairs)) - trajectories.log_probs[steps, samples]).exp()
    bounded = torch.minimum(ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage)
    return -alpha * bounded.mean()


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_its_updates_are_clipped_policy_gradients_on_random_transitions(env, make, roll, trainable):
    """Three updates, redone from the rollout with torch's AdamW; the ratio soon leaves the clip range."""
    clip_range = {"lora": 2e-4, "full": 2e-3}[trainable]
    options = {"updates": 3, "batch_size": 11, "clip_range": clip_range, "max_grad_norm": 0.1, "adam_epsilon": 1e-3}
    options |= {"reward_weight": 20.0, "weight_decay": 0.01}
    agent, other = make(trainable, **options), make(trainable, **options)
    rolled = rewarded(roll(env, agent.policy))
    batches, before = record(agent), weights(agent)
    metrics = update(agent, rolled)
    parameters = list(other.policy.trainable_parameters().values())
    adam = torch.optim.AdamW(parameters, lr=1e-3, eps=1e-3, weight_decay=0.01)
    losses, norms = [], []
    for batch in batches:
        pairs = places(batch.action, rolled)
        assert len(set(pairs)) == 11
        loss = by_hand(other.policy, rolled, pairs, alpha=20.0, clip_range=clip_range)
        adam.zero_grad()
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, 0.1).item())
        adam.step()
    assert len({tuple(places(batch.action, rolled)) for batch in batches}) == 3
    assert metrics["clip_fraction"] > 0.1
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-3, abs=1e-4)
    assert metrics["grad_norm"] == pytest.approx(np.mean(norms), rel=1e-2)
    assert (metrics["updates"], metrics["samples_dropped"]) == (3, 0)
    close(weights(agent) - before, weights(other) - before, 1e-2)


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_one_update_on_all_transitions(env, make, roll, trainable):
    agent = make(trainable)
    rolled = rewarded(roll(env, agent.policy))
    expected = slope(by_hand(agent.policy, rolled, every_pair(rolled)), agent.parameters)
    batches = record(agent)
    update(agent, rolled)
    assert expected.norm() > 0.01
    assert sorted(places(batches[0].action, rolled)) == every_pair(rolled)
    close(gradients(agent), expected, 1e-4)


def test_the_reward_weight_scales_the_policy_gradient(make, rolled):
    agent, other = make(reward_weight=1.0), make(reward_weight=7.0)
    update(agent, rolled)
    update(other, rolled)
    close(gradients(other), 7 * gradients(agent), 1e-4)


@pytest.mark.parametrize("form", ["closed_form", "unscaled", "squared_log_ratio"])
@pytest.mark.parametrize("trainable", TRAINABLE)
def test_the_penalty_is_weighted_on_its_own(env, make, make_policy, roll, trainable, form):
    """The gradient of alpha PG + beta KL, the divergence by torch.distributions."""
    agent, other = make(trainable, reward_weight=7.0, kl_weight=30.0, kl_form=form), make(trainable)
    rolled = rewarded(roll(env, agent.policy))
    pretrained = make_policy(env, scale=0.0)
    penalty = penalties(agent.policy, pretrained, *transitions(rolled), form).mean()
    pull = 30 * slope(penalty, agent.parameters)
    metrics = update(agent, rolled)
    update(other, rolled)
    assert pull.norm() > 0.01 * gradients(other).norm()
    close(gradients(agent) - 7 * gradients(other), pull, 2e-3)
    assert metrics["kl_penalty"] == pytest.approx(rolled.latents[0, 0].numel() * penalty.item(), rel=1e-3)  # in nats


def test_without_weight_the_pretrained_model_is_not_asked(make, rolled):
    agent = make()
    agent.policy.reference_distribution = None
    assert "kl_penalty" not in update(agent, rolled)


# --- options ---------------------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_authors():
    """google-research/dpok, train_online_pg.py: p_step, p_batch_size * gradient_accumulation_steps, v_step, ..."""
    config = DPOK.Config()
    assert (config.updates, config.batch_size, config.clip_range, config.max_grad_norm) == (5, 24, 1e-4, 0.1)
    assert (config.value_updates, config.value_batch_size, config.value_learning_rate) == (5, 256, 1e-4)
    assert (config.reward_weight, config.kl_weight, config.learning_rate) == (100, 0.01, 1e-5)
    assert (config.lora_rank, config.trainable, config.weight_decay) == (4, "lora", 0)
    assert config.value_function and config.normalization == "none"


def test_by_default_raw_rewards_are_not_clipped(env, make_agent, roll):
    agent = make_agent(env, agent=DPOK, value_function=False, normalization="none", batch_size=ALL, updates=1)
    rolled = replace(roll(env, agent.policy), rewards=-20.0 - 30 * torch.arange(NUMBER))
    batches = record(agent)
    update(agent, rolled)
    assert set(batches[0].advantage.tolist()) == set(rolled.rewards.tolist())


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("updates", 0, "updates=0 must be larger than 0"),
        ("reward_weight", 0.0, "reward_weight=0.0 must be larger than 0"),
        ("value_learning_rate", -1.0, "value_learning_rate=-1.0 must be larger than 0"),
        ("value_batch_size", 0, "value_batch_size=0 must be larger than 0"),
        ("replay_iterations", 0, "replay_iterations=0 must be larger than 0"),
        ("kl_weight", -1.0, "kl_weight=-1.0 must be at least 0"),
        ("kl_weight", float("nan"), "kl_weight=nan must be finite"),
        ("value_updates", -1, "value_updates=-1 must be at least 0"),
        ("kl_form", "kl", "kl_form='kl' must be one of squared_log_ratio, closed_form, unscaled"),
    ],
)
def test_an_option_out_of_range_is_named(name, value, message):
    with pytest.raises(ValueError, match=message):
        DPOK.Config(**{name: value})
