"""DPOK's replay buffer: what is drawn from it, samples whose reward failed, and the checkpoint of it all."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from agent_updates import close, every_pair, log_prob, part_of, record, rewarded, transitions, update, weights
from diffusion_gym.agents.algorithms import NoUsableReward
from diffusion_gym.storage import load_tensors, save_tensors
from dpok_options import ALL, NUMBER, STEPS, VALUE


def iterations(env, agent, number, roll):
    """Rollouts and updates in turn: the rollouts, and the batches of each update."""
    rollouts, drawn = [], []
    for iteration in range(number):
        rollouts.append(rewarded(roll(env, agent.policy, iteration), iteration))
        batches = record(agent)
        update(agent, rollouts[-1], iteration)
        drawn.append(batches)
        del agent.losses  # the recording one
    return rollouts, drawn


def origins(batch, rollouts):
    """(rollout, sample, step) of each transition of a batch."""
    found = []
    for row in batch.action.flatten(1):
        for index, trajectories in enumerate(rollouts):
            for step, sample in (trajectories.latents[1:].flatten(2) == row).all(2).nonzero().tolist():
                found.append((index, sample, step))
    assert len(found) == len(batch.action)
    return found


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_transitions_of_the_last_rollouts_are_drawn_and_no_older_ones(env, make, roll, kept):
    agent = make(replay_iterations=kept, batch_size=1000, updates=2, learning_rate=1e-2)
    rollouts, drawn = iterations(env, agent, 4, roll)
    for iteration, batches in enumerate(drawn):
        recent = range(max(0, iteration - kept + 1), iteration + 1)
        every = [(index, sample, step) for index in recent for sample in range(NUMBER) for step in range(STEPS)]
        for batch in batches:
            assert sorted(origins(batch, rollouts)) == every
    assert len(drawn) == 4 and all(len(batches) == 2 for batches in drawn)


def test_replayed_transitions_keep_their_log_probabilities_prompts_and_rewards(env, make, roll):
    agent = make(replay_iterations=2, batch_size=17, updates=3, learning_rate=1e-2)
    rollouts, drawn = iterations(env, agent, 3, roll)
    orders = []
    for batch in drawn[-1]:
        found = origins(batch, rollouts)
        assert len(set(found)) == 17 and {index for index, *_ in found} == {1, 2}
        orders.append(found)
        for row, (index, sample, step) in enumerate(found):
            source = rollouts[index]
            assert batch.old_log_prob[row] == source.log_probs[step, sample]
            assert batch.advantage[row] == source.rewards[sample]
            assert torch.equal(batch.observation["latents"][row], source.latents[step, sample])
            assert batch.observation["timestep"][row] == source.timesteps[step]
            assert torch.equal(batch.observation["prompt"][row], source.tokens[sample])
    assert orders[0] != orders[1] != orders[2]
    with torch.no_grad():  # the policy has moved since: scoring them anew would give other numbers
        old = rollouts[1]
        now = log_prob(agent.policy, *transitions(old, every_pair(old)))
    assert (now - old.log_probs.T.flatten()).abs().median() > 1e-3


def test_every_transition_is_drawn_equally_often(make, rolled):
    agent = make()
    update(agent, rolled)
    rng, number, draws = np.random.default_rng(0), 5, 4000
    counts = np.zeros((NUMBER, STEPS))
    for _ in range(draws):
        pairs, _, count = agent._draw(number, None, rng)
        assert count == number and len({tuple(pair) for pair in pairs.tolist()}) == number
        np.add.at(counts, tuple(pairs.numpy().T), 1)
    chance = number / ALL
    assert np.abs(counts / draws - chance).max() < 5 * (chance * (1 - chance) / draws) ** 0.5


# --- missing rewards -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [float("nan"), float("inf"), float("-inf")])
def test_samples_whose_reward_failed_are_left_out(env, make, roll, missing):
    """As if they had never been sampled: the same transitions are drawn."""
    options = {**VALUE, "value_batch_size": 10, "value_updates": 2, "updates": 3, "batch_size": 7}
    agent, other = (make(**options, adam_epsilon=1e-3) for _ in range(2))
    rolled = rewarded(roll(env, agent.policy))
    rolled.rewards[[1, 4]] = missing
    kept = [0, 2, 3, 5]
    before = weights(agent)
    metrics, expected = update(agent, rolled), update(other, part_of(rolled, kept))
    assert metrics.pop("samples_dropped") == 2 and expected.pop("samples_dropped") == 0
    assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-6)
    close(weights(agent) - before, weights(other) - before, 1e-3)


def test_samples_whose_reward_failed_stay_out_of_later_updates(env, make, roll):
    agent = make(replay_iterations=2, batch_size=1000)
    first, second = (rewarded(roll(env, agent.policy, seed), seed) for seed in (0, 1))
    first.rewards[[0, 3]] = float("nan")
    update(agent, first)
    batches = record(agent)
    assert update(agent, second)["samples_dropped"] == 0
    found = origins(batches[0], [first, second])
    assert {sample for index, sample, _ in found if index == 0} == {1, 2, 4, 5}
    assert {sample for index, sample, _ in found if index == 1} == set(range(NUMBER))


def test_a_rollout_without_a_usable_reward_stays_out_of_the_buffer(env, make, roll):
    agent = make(replay_iterations=2)
    rolled = rewarded(roll(env, agent.policy))
    update(agent, rolled)
    before = {name: value.clone() for name, value in agent.tensors().items()}
    with pytest.raises(NoUsableReward):
        update(agent, replace(rolled, rewards=torch.full((NUMBER,), float("nan"))))
    after = agent.tensors()
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())


# --- checkpoints -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("done", [1, 4], ids=["part of the buffer", "a full buffer"])
@pytest.mark.parametrize("kept", [1, 3])
def test_after_a_checkpoint_the_next_update_is_the_same_bit_for_bit(env, make, roll, tmp_path, kept, done):
    options = {**VALUE, "value_batch_size": 9, "updates": 2, "batch_size": 7, "kl_weight": 0.5}
    options |= {"replay_iterations": kept, "ema_decay": 0.5, "normalization": "prompt", "statistics_min_count": 2}
    agent, other = make(**options), make(**options, scale=0.5)
    with torch.no_grad():
        for parameter in other.value.parameters():
            parameter.add_(1.0)
    for seed in range(done):
        update(agent, rewarded(roll(env, agent.policy, seed), seed), seed)
    save_tensors(tmp_path / "agent.safetensors", agent.tensors(), {})
    state = json.loads(json.dumps(agent.state()))
    other.load_tensors(load_tensors(tmp_path / "agent.safetensors"))
    other.load_state(state)
    for seed in (10, 11, 12):
        rolled = rewarded(roll(env, agent.policy, seed), seed)
        assert update(agent, rolled, seed) == update(other, rolled, seed)
        ours, theirs = agent.tensors(), other.tensors()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
        assert agent.state() == other.state()
