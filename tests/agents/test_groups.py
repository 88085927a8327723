"""Which transitions an update is made of: groups of samples, drawn time steps, micro-batches in any order."""

from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from agent_updates import ascent, close, gradients, part_of, places, rewarded, update, weights
from diffusion_gym.agents.algorithms import AGENTS, DDPOIS, DDPOSF, DPOK
from diffusion_gym.agents.algorithms.policy_gradient import PolicyGradientAgent
from diffusion_gym.agents.rollout import collect_many

POLICY_GRADIENTS = [name for name in AGENTS if issubclass(AGENTS[name], PolicyGradientAgent)]
NUMBER, STEPS = 12, 4


@pytest.fixture
def env(make_env):
    return make_env(NUMBER)


def drawn(agent, rolled, seed=0):
    """The (sample, step) pairs that an update uses, in order, found by their actions."""
    seen = []
    hook = agent.policy.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    update(agent, rolled, seed)
    hook.remove()
    return places(torch.cat(seen), rolled)


# --- groups ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [2, 3, 12])
def test_a_group_shares_its_prompt_and_nothing_else(env, make_policy, group_size):
    rolled = collect_many(env, make_policy(env), 3 * NUMBER, (0, 1), group_size=group_size)
    groups = [rolled.prompts[start : start + group_size] for start in range(0, 3 * NUMBER, group_size)]
    assert all(len(set(group)) == 1 for group in groups)
    assert len({group[0] for group in groups}) > 1
    assert torch.equal(rolled.tokens, env.unwrapped.model.tokenize(list(rolled.prompts)))
    for latents in rolled.latents:  # the noise at the start, and that of every step
        assert len({tuple(row) for row in latents.flatten(1).tolist()}) == 3 * NUMBER


def test_a_group_may_share_the_noise_at_the_start_too(env, make_policy):
    """DanceGRPO; every group begins as its first sample does without, and the noise of the actions stays."""
    policy = make_policy(env)
    own = collect_many(env, policy, 2 * NUMBER, (0, 1), group_size=4)
    shared = collect_many(env, policy, 2 * NUMBER, (0, 1), group_size=4, shared_noise=True)
    assert shared.prompts == own.prompts
    assert torch.equal(shared.latents[0], own.latents[0][::4].repeat_interleave(4, 0))
    assert torch.equal(shared.latents[:, ::4], own.latents[:, ::4])
    for latents in shared.latents[1:]:
        assert len({tuple(row) for row in latents.flatten(1).tolist()}) == 2 * NUMBER


def test_shared_noise_without_groups_is_refused():
    with pytest.raises(ValueError, match="shared_noise=True needs group_size=1 to be at least 2"):
        DDPOIS.Config(shared_noise=True)


def test_the_prompts_of_groups_are_drawn_as_those_of_samples(make_env, make_policy):
    """Over many groups each of the three prompts comes equally often, in all places of a batch."""
    env, number = make_env(NUMBER, num_inference_steps=1, guidance_scale=1.0), 60
    rolled = collect_many(env, make_policy(env), number * NUMBER, (0,), group_size=4)
    firsts = np.array(rolled.prompts[::4]).reshape(number, 3)
    for place in range(3):
        counts = Counter(firsts[:, place])
        assert len(counts) == 3
        assert all(abs(count - 20) < 4 * (60 * 2 / 9) ** 0.5 for count in counts.values())
    assert sum(row[0] == row[1] for row in firsts) < 40  # a third: groups do not follow each other


def test_groups_are_the_same_for_the_same_seed_alone(env, make_policy, roll):
    policy = make_policy(env)
    first = collect_many(env, policy, NUMBER, (3, 1), group_size=3)
    roll(env, policy, 77)
    np.random.seed(5)
    torch.manual_seed(5)
    again = collect_many(env, policy, NUMBER, (3, 1), group_size=3)
    assert first.prompts == again.prompts and torch.equal(first.latents, again.latents)
    others = [collect_many(env, policy, NUMBER, (3, seed), group_size=3) for seed in (2, 3, 4)]
    assert all(not torch.equal(first.latents, other.latents) for other in others)
    assert any(first.prompts != other.prompts for other in others)


def test_groups_have_the_noise_of_single_samples(env, make_policy):
    """A group changes prompts alone."""
    policy = make_policy(env)
    single, grouped = (collect_many(env, policy, NUMBER, (3, 1), group_size=size) for size in (1, 4))
    assert torch.equal(single.latents[0], grouped.latents[0])
    assert single.prompts != grouped.prompts


@pytest.mark.parametrize("group_size", [5, 8, 24])
def test_a_group_that_does_not_fit_the_batch_is_refused(env, make_policy, group_size):
    with pytest.raises(ValueError, match=f"group_size={group_size} must divide the rollout's batch, num_envs=12"):
        collect_many(env, make_policy(env), 2 * NUMBER, (0,), group_size=group_size)


@pytest.mark.parametrize("name", POLICY_GRADIENTS)
def test_the_agents_sample_in_groups_and_compare_within_them(env, make_agent, name):
    agent = make_agent(env, agent=AGENTS[name], group_size=4, normalization="group")
    rolled = rewarded(agent.sample(env, 2 * NUMBER, (0, 0)))
    assert len(rolled) == 2 * NUMBER
    groups = rolled.rewards.double().numpy().reshape(6, 4)
    assert all(len(set(rolled.prompts[start : start + 4])) == 1 for start in range(0, 24, 4))
    expected = np.concatenate([(group - np.mean(group)) / np.std(group) for group in groups])
    np.testing.assert_allclose(agent.normalized_rewards(rolled), expected, rtol=1e-9)


def test_groups_of_one_prompt_are_not_put_together(env, make_agent, roll):
    agent = make_agent(env, group_size=6, normalization="group")
    rolled = replace(rewarded(roll(env, agent.policy)), prompts=("a red circle",) * NUMBER)
    before = agent.advantages(rolled)
    rolled.rewards[6:] *= 1e3
    rolled.rewards[7] = 9.0
    after = agent.advantages(rolled)
    assert after[:6].tolist() == before[:6].tolist() and after[6:].tolist() != before[6:].tolist()


@pytest.mark.parametrize("agent_class", [DDPOSF, DDPOIS])
def test_the_gradient_of_groups_with_missing_rewards(env, make_agent, roll, agent_class):
    options = {"group_size": 4, "normalization": "group", "batch_size": NUMBER, "max_grad_norm": 1e9}
    agent = make_agent(env, agent=agent_class, **options)
    rolled = rewarded(roll(env, agent.policy))
    rolled.rewards[[1, 8, 9, 10, 11]] = float("nan")  # the third group has none
    rewards, advantages = rolled.rewards.double().numpy(), np.zeros(NUMBER)
    for own in ([0, 2, 3], [4, 5, 6, 7]):
        advantages[own] = (rewards[own] - np.mean(rewards[own])) / np.std(rewards[own])
    usable = [0, 2, 3, 4, 5, 6, 7]
    expected = ascent(agent, rolled, advantages, [(sample, step) for sample in usable for step in range(STEPS)])
    assert update(agent, rolled)["samples_dropped"] == 5
    close(-gradients(agent), expected, 1e-4)


@pytest.mark.parametrize("name", POLICY_GRADIENTS)
def test_a_group_of_one_is_refused(name):
    with pytest.raises(ValueError, match="normalization='group' needs group_size=1 to be at least 2"):
        AGENTS[name].Config(normalization="group")
    with pytest.raises(ValueError, match="normalization='groups' must be one of prompt, batch, group, none"):
        AGENTS[name].Config(normalization="groups")


# --- time steps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fraction, part, steps, count",
    [
        (1.0, (0.0, 1.0), range(10), 10),
        (0.5, (0.0, 1.0), range(10), 5),
        (0.33, (0.0, 1.0), range(10), 3),
        (0.01, (0.0, 1.0), range(10), 1),  # never none
        (0.5, (0.2, 0.8), range(2, 8), 3),
        (1.0, (0.5, 1.0), range(5, 10), 5),
    ],
)
def test_each_trajectory_gives_its_share_of_distinct_steps(make_env, make_agent, fraction, part, steps, count):
    agent = make_agent(make_env(2, num_inference_steps=10), timestep_fraction=fraction, trained_steps=part)
    samples = np.array([3, 0, 7, 8])
    pairs = agent.transitions(samples, np.random.default_rng(0)).tolist()
    assert len({tuple(pair) for pair in pairs}) == len(pairs) == 4 * count
    assert Counter(sample for sample, _ in pairs) == dict.fromkeys((0, 3, 7, 8), count)
    assert {step for _, step in pairs} <= set(steps)
    if fraction == 1:
        assert sorted(pairs) == [[sample, step] for sample in sorted(samples) for step in steps]
    assert pairs != sorted(pairs)


def test_all_steps_are_equally_likely_and_drawn_for_each_trajectory_on_its_own(make_env, make_agent):
    agent = make_agent(make_env(2, num_inference_steps=10), timestep_fraction=0.3)
    number, chance = 6000, 0.3
    pairs = agent.transitions(np.arange(number), np.random.default_rng(0)).numpy()
    taken = np.zeros((number, 10))
    taken[pairs[:, 0], pairs[:, 1]] = 1
    assert (taken.sum(1) == 3).all()
    assert np.abs(taken.mean(0) - chance).max() < 5 * (chance * (1 - chance) / number) ** 0.5
    assert len({tuple(row) for row in taken}) == 120  # every choice of 3 of 10 steps
    # two steps come together as often as without replacement, 3/10 * 2/9
    together = (taken.T @ taken)[np.triu_indices(10, 1)] / number
    chance = 3 / 10 * 2 / 9
    assert np.abs(together - chance).max() < 5 * (chance * (1 - chance) / number) ** 0.5
    assert abs(np.corrcoef(pairs[:, 0], np.arange(len(pairs)))[0, 1]) < 0.05  # in random order


def test_a_deterministic_step_is_not_among_them(make_env, make_agent, exact_end_pipeline):
    agent = make_agent(make_env(2, num_inference_steps=4, model=str(exact_end_pipeline)), timestep_fraction=0.67)
    pairs = agent.transitions(np.arange(50), np.random.default_rng(0)).tolist()
    assert {step for _, step in pairs} == {0, 1, 2} and len(pairs) == 50 * 2


@pytest.mark.parametrize("agent_class", [DDPOSF, DDPOIS])
def test_the_gradient_is_the_mean_over_the_drawn_transitions(env, make_agent, roll, agent_class):
    options = {"timestep_fraction": 0.5, "batch_size": NUMBER, "max_grad_norm": 1e9}
    agent, other = (make_agent(env, agent=agent_class, **options) for _ in range(2))
    rolled = rewarded(roll(env, agent.policy))
    rewards = rolled.rewards.double().numpy()
    pairs = drawn(agent, rolled)
    assert Counter(sample for sample, _ in pairs) == dict.fromkeys(range(NUMBER), 2) and len(set(pairs)) == 24
    close(-gradients(agent), ascent(other, rolled, (rewards - np.mean(rewards)) / np.std(rewards), pairs), 1e-4)


def test_its_expectation_is_the_gradient_over_all_steps(env, make_agent, roll):
    """Four draws of one step each that together are all transitions average to the whole gradient: by linearity."""
    options = {"agent": DDPOSF, "max_grad_norm": 1e9}
    whole, agent = make_agent(env, **options), make_agent(env, timestep_fraction=0.25, **options)
    rolled = rewarded(roll(env, whole.policy))
    update(whole, rolled)
    first = agent.transitions(np.arange(NUMBER), np.random.default_rng(0))
    sums, start = 0.0, {name: value.clone() for name, value in agent.tensors().items() if name.startswith("policy")}
    for shift in range(STEPS):
        shifted = torch.stack([first[:, 0], (first[:, 1] + shift) % STEPS], 1)
        agent.transitions = lambda samples, rng, shifted=shifted: shifted
        update(agent, rolled)
        sums = sums + gradients(agent) / STEPS
        with torch.no_grad():
            for name, parameter in agent.policy.trainable_parameters().items():
                parameter.copy_(start[f"policy.{name}"])
    close(sums, gradients(whole), 1e-4)


def test_every_epoch_draws_anew(env, make_agent, roll):
    agent = make_agent(env, timestep_fraction=0.5, batch_size=5, inner_epochs=2, learning_rate=1e-9)
    rolled = rewarded(roll(env, agent.policy))
    pairs = drawn(agent, rolled)
    first, second = set(pairs[:24]), set(pairs[24:])
    assert len(pairs) == 48 and len(first) == len(second) == 24
    assert first != second
    for epoch in (first, second):
        assert Counter(sample for sample, _ in epoch) == dict.fromkeys(range(NUMBER), 2)
    assert [sample for sample, _ in pairs[:10]] != sorted(sample for sample, _ in pairs[:10])


# --- micro-batches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "trainable"),
    [*((name, "lora") for name in AGENTS), *((name, "full") for name in ("ddpo_is", "dpok", "rwr"))],
)
def test_micro_batches_and_order_change_nothing(make_env, make_agent, name, trainable):
    """For every agent of the registry, over two updates, the items of each in another order and in other parts."""

    def steep(images, prompts, metadata):  # an epsilon as large as below would swallow the slope of a mean
        return 1e4 * images.mean((1, 2, 3))

    steep.differentiable = True
    env = make_env(6, num_inference_steps=3, **({"reward": steep} if name == "reward_gradient" else {}))
    known = {entry.name for entry in fields(AGENTS[name].Config)}
    options = {"batch_size": 10 if name == "dpok" else 4, "updates": 2, "inner_epochs": 1, "adam_epsilon": 1e-3}
    options |= {"value_batch_size": 12, "value_updates": 2, "kl_weight": 0.5, "reward_weight": 2.0, "percentile": 0.3}
    results = []
    for micro, shuffled in ((64, False), (1, False), (7, True)):
        chosen = {**options, "micro_batch_size": micro}
        agent = make_agent(env, trainable, agent=AGENTS[name], **{k: v for k, v in chosen.items() if k in known})
        for optimizer in (agent.optimizer, getattr(agent, "value_optimizer", None)):
            if shuffled and optimizer is not None:
                shuffle_items(optimizer)
        rolled = rewarded(agent.sample(env, 6, (0,)))
        before = weights(agent)
        metrics = update(agent, rolled)
        values = [parameter for key, parameter in agent.tensors().items() if key.startswith("value.")]
        results.append((metrics, gradients(agent), weights(agent) - before, values))
    (metrics, gradient, change, values), *others = results
    assert change.abs().max() > 1e-4 and len(values) == (12 if name == "dpok" else 0)
    for other_metrics, other_gradient, other_change, other_values in others:
        assert other_metrics == pytest.approx(metrics, rel=1e-3, abs=1e-5)
        close(other_gradient, gradient, 5e-4)
        close(other_change, change, 1e-3)
        for other_value, value in zip(other_values, values, strict=True):
            torch.testing.assert_close(other_value, value, rtol=1e-3, atol=1e-5)


def shuffle_items(optimizer):
    """Give the optimiser the items of each update in another order."""
    step, generator = optimizer.step, torch.Generator().manual_seed(3)
    optimizer.step = lambda items, *rest, **options: step(
        items[torch.randperm(len(items), generator=generator)], *rest, **options
    )


@pytest.mark.parametrize("agent_class", [DDPOSF, DDPOIS, DPOK])
def test_the_order_of_the_samples_changes_nothing(env, make_agent, roll, agent_class):
    """Where one update uses all transitions."""
    options = {"batch_size": NUMBER * STEPS, "max_grad_norm": 1e9, "normalization": "batch"}
    if agent_class is DPOK:
        options |= {"updates": 1, "value_function": False}
    agent, other = (make_agent(env, agent=agent_class, **options) for _ in range(2))
    rolled = rewarded(roll(env, agent.policy))
    order = np.random.default_rng(1).permutation(NUMBER)
    mixed = part_of(rolled, order)
    metrics, expected = update(agent, mixed), update(other, rolled)
    assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-5)
    close(gradients(agent), gradients(other), 1e-4)
