"""DPOK: its updates redone by hand from the rollouts, its value function, its replay buffer, its checkpoint."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from diffusion_gym.agents.algorithms import DPOK, NoUsableReward
from diffusion_gym.storage import load_tensors, save_tensors

TRAINABLE = ["lora", "full"]
NUMBER, STEPS = 6, 4
ALL = NUMBER * STEPS

# One update on every transition, without value function and penalty: each test adds what it is about.
PLAIN = {
    "value_function": False,
    "kl_weight": 0.0,
    "reward_weight": 1.0,
    "updates": 1,
    "batch_size": ALL,
    "micro_batch_size": 1000,
    "max_grad_norm": 1e9,
    "normalization": "none",
}


@pytest.fixture
def env(make_env):
    return make_env(NUMBER)


@pytest.fixture
def make(env, make_agent):
    """`make(**options)`: an agent with the options of `PLAIN` and these."""

    def build(trainable="lora", env=env, scale=0.05, **options):
        return make_agent(env, trainable, scale, agent=DPOK, **{**PLAIN, **options})

    return build


@pytest.fixture
def rolled(env, make, roll):
    """A rollout with rewards of a wide spread."""
    return rewarded(roll(env, make().policy))


def rewarded(trajectories, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return replace(trajectories, rewards=torch.randn(len(trajectories), generator=generator))


def update(agent, trajectories, seed=0):
    return agent.update(trajectories, np.random.default_rng(seed))


def weights(agent):
    return torch.cat([parameter.detach().flatten() for parameter in agent.parameters])


def gradients(agent):
    """Of the last update, after the gradient's norm was clipped."""
    return torch.cat([parameter.grad.flatten() for parameter in agent.parameters])


def close(ours, reference, tolerance):
    assert reference.norm() > 1e-6
    assert (ours - reference).norm() <= tolerance * reference.norm()


def record(agent):
    """The batches of transitions that the policy is updated on from now on, one an update."""
    batches, losses = [], agent.losses

    def recorded(batch):
        batches.append(batch)
        return losses(batch)

    agent.losses = recorded
    return batches


def places(batch, trajectories):
    """(sample, step) of each transition of a batch, found by its action."""
    actions = trajectories.latents[1:].flatten(2)
    found = []
    for row in batch.action.flatten(1):
        step, sample = (actions == row).all(2).nonzero()[0].tolist()
        found.append((sample, step))
    return found


def states(trajectories, pairs):
    samples, steps = torch.tensor(pairs).unbind(1)
    return trajectories.states(samples, steps), trajectories.actions(samples, steps)


def every_pair(trajectories):
    return [(sample, step) for sample in range(len(trajectories)) for step in range(STEPS)]


def log_prob(policy, observation, action):
    gaussian = policy.distribution(observation)
    return Normal(gaussian.mean, gaussian.std).log_prob(action).flatten(1).mean(1)


def by_hand(policy, trajectories, pairs, *, alpha=1.0, clip_range=0.2, baseline=None):
    """Mean of -alpha min(ratio A, clipped ratio A) of the given transitions of a rollout."""
    observation, action = states(trajectories, pairs)
    samples, steps = torch.tensor(pairs).unbind(1)
    advantage = trajectories.rewards[samples] - (0 if baseline is None else baseline)
    ratio = (log_prob(policy, observation, action) - trajectories.log_probs[steps, samples]).exp()
    bounded = torch.minimum(ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage)
    return -alpha * bounded.mean()


def slope(loss, parameters):
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(parameters))])


# --- the policy ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_its_updates_are_clipped_policy_gradients_on_random_transitions(env, make, roll, trainable):
    """Three updates, redone from the rollout with torch's AdamW; the ratio soon leaves the clip range."""
    options = {"updates": 3, "batch_size": 11, "clip_range": 2e-3, "max_grad_norm": 0.1, "adam_epsilon": 1e-3}
    options |= {"reward_weight": 20.0, "weight_decay": 0.01}
    agent, other = make(trainable, **options), make(trainable, **options)
    rolled = rewarded(roll(env, agent.policy))
    batches, before = record(agent), weights(agent)
    metrics = update(agent, rolled)
    parameters = list(other.policy.trainable_parameters().values())
    adam = torch.optim.AdamW(parameters, lr=1e-3, eps=1e-3, weight_decay=0.01)
    losses, norms = [], []
    for batch in batches:
        pairs = places(batch, rolled)
        assert len(set(pairs)) == 11
        loss = by_hand(other.policy, rolled, pairs, alpha=20.0, clip_range=2e-3)
        adam.zero_grad()
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, 0.1).item())
        adam.step()
    assert len({tuple(places(batch, rolled)) for batch in batches}) == 3
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
    assert sorted(places(batches[0], rolled)) == every_pair(rolled)
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
    observation, action = states(rolled, every_pair(rolled))
    ours = agent.policy.distribution(observation)
    with torch.no_grad():
        reference = make_policy(env, scale=0.0).distribution(observation)
    ours, reference = Normal(ours.mean, ours.std), Normal(reference.mean, reference.std)
    if form == "squared_log_ratio":
        difference = (ours.log_prob(action) - reference.log_prob(action)).flatten(1).mean(1)
        penalty = (difference**2 / 2).mean()
    else:
        scale = 1.0 if form == "closed_form" else 2 * ours.stddev**2
        penalty = (kl_divergence(ours, reference) * scale).mean()
    pull = 30 * slope(penalty, agent.parameters)
    metrics = update(agent, rolled)
    update(other, rolled)
    assert pull.norm() > 0.01 * gradients(other).norm()
    close(gradients(agent) - 7 * gradients(other), pull, 2e-3)
    assert metrics["kl_penalty"] == pytest.approx(penalty.item(), rel=1e-3)


def test_without_weight_the_pretrained_model_is_not_asked(make, rolled):
    agent = make()
    agent.policy.reference_distribution = None
    assert "kl_penalty" not in update(agent, rolled)


# --- the value function ----------------------------------------------------------------------------------------

VALUE = {"value_function": True, "value_updates": 1, "value_batch_size": ALL, "value_learning_rate": 1e-2}


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
    order = [every_pair(rolled).index(pair) for pair in places(batches[0], rolled)]
    torch.testing.assert_close(batches[0].advantage, advantage[order], rtol=1e-4, atol=1e-5)
    assert (advantage - rewards).abs().min() > 1e-4 and (baseline - stale).abs().max() > 0.01
    ratio = (log_prob(untouched.policy, *states(rolled, every_pair(rolled))) - rolled.log_probs.T.flatten()).exp()
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
            pairs = places(batches[0], rolled)
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


# --- replay ----------------------------------------------------------------------------------------------------


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
        now = log_prob(agent.policy, *states(old, every_pair(old)))
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
    few = replace(
        rolled,
        prompts=tuple(rolled.prompts[index] for index in kept),
        tokens=rolled.tokens[kept],
        latents=rolled.latents[:, kept],
        log_probs=rolled.log_probs[:, kept],
        rewards=rolled.rewards[kept],
        images=rolled.images[kept],
    )
    before = weights(agent)
    metrics, expected = update(agent, rolled), update(other, few)
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
        ("kl_weight", float("nan"), "kl_weight=nan must be at least 0"),
        ("value_updates", -1, "value_updates=-1 must be at least 0"),
        ("kl_form", "kl", "kl_form='kl' must be one of squared_log_ratio, closed_form, unscaled"),
    ],
)
def test_an_option_out_of_range_is_named(name, value, message):
    with pytest.raises(ValueError, match=message):
        DPOK.Config(**{name: value})
