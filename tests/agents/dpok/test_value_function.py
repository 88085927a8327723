"""DPOK's value function: what it is fitted to, and what the policy learns from it."""

import copy
from dataclasses import replace

import pytest
import torch

from agent_updates import (
    close,
    every_pair,
    gradients,
    log_prob,
    places,
    record,
    rewarded,
    slope,
    transitions,
    update,
    weights,
)
from dpok_options import NUMBER, STEPS, VALUE


def values(agent, network, trajectories, pairs):
    """V(x_t, t, c) of transitions."""
    samples, steps = torch.tensor(pairs).unbind(1)
    tokens = agent.policy.model.tokenize([trajectories.prompts[sample] for sample in samples])
    return network(
        trajectories.latents[steps, samples], trajectories.timesteps[steps], agent.policy.model.embed(tokens)
    )


def value_weights(network):
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def test_the_value_function_is_fitted_to_the_rewards(make, rolled):
    """One AdamW step on the squared error, redone by hand; the policy's update leaves it alone."""
    agent = make(**VALUE, updates=3, adam_epsilon=1e-3)
    network = copy.deepcopy(agent.value)
    before = value_weights(network)
    error = (values(agent, network, rolled, every_pair(rolled)) - rolled.rewards.repeat_interleave(STEPS)) ** 2
    metrics = update(agent, rolled)
    adam = torch.optim.AdamW(network.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.0)
    error.mean().backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    adam.step()
    assert metrics["value_loss"] == pytest.approx(error.mean().item(), rel=1e-4)
    close(value_weights(agent.value) - before, value_weights(network) - before, 1e-3)
    for ours, expected in zip(agent.value.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("clip", [1e6, 0.5])
def test_the_policy_learns_from_rewards_minus_values(make, rolled, clip):
    """The value function is fitted first; its values carry no gradient into the policy."""
    agent, untouched = make(**VALUE, advantage_clip=clip), make(**VALUE)
    batches = record(agent)
    update(agent, rolled)
    with torch.no_grad():
        baseline, stale = (values(agent, net, rolled, every_pair(rolled)) for net in (agent.value, untouched.value))
    rewards = rolled.rewards.repeat_interleave(STEPS)
    advantage = (rewards - baseline).clamp(-clip, clip)
    order = [every_pair(rolled).index(pair) for pair in places(batches[0].action, rolled)]
    torch.testing.assert_close(batches[0].advantage, advantage[order], rtol=1e-4, atol=1e-5)
    assert (advantage - rewards).abs().min() > 1e-4 and (baseline - stale).abs().max() > 0.01
    ratio = (log_prob(untouched.policy, *transitions(rolled, every_pair(rolled))) - rolled.log_probs.T.flatten()).exp()
    close(gradients(agent), slope(-(ratio * advantage).mean(), untouched.parameters), 1e-3)


def test_the_value_functions_updates_do_not_reach_the_policy(make, rolled):
    """The policy may not move here: equal rewards, which the baseline is told exactly."""
    agent = make(**{**VALUE, "value_learning_rate": 1e-30}, weight_decay=0.0)
    before = weights(agent)
    with torch.no_grad():
        for parameter in agent.value.parameters():
            parameter.zero_()
        agent.value.head[-1].bias.fill_(0.75)
    rolled.rewards[:] = 0.75
    metrics = update(agent, rolled)
    assert metrics["value_loss"] == 0 and metrics["grad_norm"] == 0
    assert torch.equal(weights(agent), before)
    rolled.rewards[:] = 1.75  # now the value function has a gradient, and so has the policy
    assert update(make(**VALUE), rolled)["grad_norm"] > 0
    frozen = [p for p in agent.policy.model.unet.parameters() if not p.requires_grad]
    assert frozen and all(parameter.grad is None for parameter in frozen)


def test_the_value_function_learns_what_prompts_and_latents_tell(env, make, roll):
    agent = make(**{**VALUE, "value_updates": 40, "value_learning_rate": 3e-3}, learning_rate=1e-12)
    rolled = roll(env, agent.policy)
    bonus = {prompt: number for number, prompt in enumerate(sorted(set(rolled.prompts)))}
    assert len(bonus) > 1
    rewards = torch.tensor([float(bonus[prompt]) for prompt in rolled.prompts])
    rolled = replace(rolled, rewards=rewards + rolled.latents[0].mean((1, 2, 3)).sign())
    losses = [update(agent, rolled, seed)["value_loss"] for seed in range(4)]
    with torch.no_grad():
        error = (values(agent, agent.value, rolled, every_pair(rolled)) - rolled.rewards.repeat_interleave(STEPS)) ** 2
    assert losses[-1] < 0.5 * losses[0]
    assert error.mean() < 0.1 * rolled.rewards.var()


def test_a_value_function_that_is_switched_off_or_not_fitted(make, rolled):
    off, unfitted = make(), make(**{**VALUE, "value_updates": 0})
    for agent in (off, unfitted):
        before = value_weights(agent.value)
        batches = record(agent)
        assert "value_loss" not in update(agent, rolled)
        assert torch.equal(value_weights(agent.value), before)
        with torch.no_grad():
            pairs = places(batches[0].action, rolled)
            baseline = values(agent, agent.value, rolled, pairs) if agent is unfitted else 0.0
        expected = rolled.rewards[[sample for sample, _ in pairs]] - baseline
        torch.testing.assert_close(batches[0].advantage, expected, rtol=1e-5, atol=1e-6)


def test_an_unconditional_model_has_values_too(make_env, make, roll):
    model = copy.copy(make_env(1).unwrapped.model)
    predict, text = model.predict, torch.zeros(1, 3, 16)
    model.prompt_length = model.vocab_size = 0
    model.predict = lambda unet, x, t, _: predict(unet, x, t, text.expand(len(x), -1, -1))
    env = make_env(NUMBER, model=model)
    agent = make(env=env, **VALUE)
    rolled = rewarded(roll(env, agent.policy))
    assert rolled.tokens is None
    assert update(agent, rolled)["value_loss"] > 0 and agent.value.prompt_features == 0
