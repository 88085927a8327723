"""DDPO_IS: its gradient is the policy gradient, whatever the micro-batches and whatever rewards are missing."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from agent_updates import close, gradients, part_of, rewarded, slope, update, weights
from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.agents.algorithms import AGENTS, DDPOIS, NoUsableReward

TRAINABLE = ["lora", "full"]
NUMBER = 12


@pytest.fixture
def env(make_env):
    return make_env(NUMBER)


def log_probs(policy, rolled, steps=range(4)):
    number = torch.arange(len(rolled))
    rows = []
    for step in steps:
        at = torch.full_like(number, step)
        rows.append(policy(rolled.states(number, at), rolled.actions(number, at)))
    return torch.stack(rows)


@pytest.mark.parametrize(("part", "steps"), [((0.0, 0.5), [0, 1]), ((0.5, 1.0), [2, 3]), ((0.25, 0.5), [1])])
def test_trained_steps_are_the_only_ones_with_a_gradient(env, make_agent, roll, part, steps):
    agent = make_agent(env, scale=0.5, batch_size=NUMBER, max_grad_norm=1e9, trained_steps=part)
    rolled = rewarded(roll(env, agent.policy))
    rewards = rolled.rewards.double()
    advantages = ((rewards - rewards.mean()) / rewards.std(correction=0)).float()
    objective = (advantages * log_probs(agent.policy, rolled, steps)).mean()
    ascent = slope(objective, agent.parameters)
    update(agent, rolled)
    assert ascent.norm() > 0.01
    close(-gradients(agent), ascent, 1e-4)


@pytest.mark.parametrize("part", [(0.5, 0.5), (-0.1, 1.0), (0.0, 1.1), (0.8, 0.2)])
def test_trained_steps_must_be_a_part_of_the_trajectory(part):
    with pytest.raises(ValueError, match=r"trained_steps=.* must be two fractions of T"):
        DDPOIS.Config(trained_steps=part)


def test_trained_steps_without_a_step_are_refused(make_agent, env):
    with pytest.raises(
        ValueError, match=r"trained_steps=\(0.3, 0.4\) must be two .* T=4.* with a stochastic step between"
    ):
        make_agent(env, trained_steps=(0.3, 0.4))


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_one_update_follows_the_policy_gradient(env, make_agent, roll, trainable):
    """DDPO, equation (4) at ratio 1: the mean of advantage times grad log pi, over samples and steps."""
    agent = make_agent(env, trainable, batch_size=NUMBER, max_grad_norm=1e9)
    rolled = rewarded(roll(env, agent.policy))
    rewards = rolled.rewards.double()
    advantages = ((rewards - rewards.mean()) / rewards.std(correction=0)).float()
    objective = (advantages * log_probs(agent.policy, rolled)).mean()
    ascent = slope(objective, agent.parameters)
    metrics = update(agent, rolled)
    assert ascent.norm() > 0.01
    close(-gradients(agent), ascent, 1e-4)
    assert metrics["grad_norm"] == pytest.approx(ascent.norm().item(), rel=1e-4)
    assert metrics["loss"] == pytest.approx(-advantages.mean().item(), abs=1e-5)
    assert (metrics["updates"], metrics["samples_dropped"], metrics["clip_fraction"]) == (1, 0, 0)
    assert 0 <= metrics["approx_kl"] < 1e-9


@pytest.mark.parametrize("trainable", TRAINABLE)
@pytest.mark.parametrize("options", [{"batch_size": 6}, {"batch_size": 4, "inner_epochs": 2}], ids=["one", "several"])
def test_the_result_does_not_depend_on_the_micro_batch(make_env, make_agent, roll, trainable, options):
    results, rows = [], []
    env = make_env(6, num_inference_steps=3)
    for micro in (1, 7, 64):
        # Adam divides by |gradient|: without a larger epsilon it would blow up the rounding of gradients that are 0
        agent = make_agent(env, trainable, micro_batch_size=micro, adam_epsilon=1e-3, **options)
        before = weights(agent)
        rows.append(update(agent, rewarded(roll(env, agent.policy))))
        results.append((weights(agent), gradients(agent)))
    (end, gradient), *others = results
    for other_end, other_gradient in others:  # measured: 4e-5, 7e-5 and 3e-6
        assert (other_gradient - gradient).norm() <= 2e-4 * gradient.norm()
        assert (other_end - end).norm() <= 5e-4 * (end - before).norm()
        torch.testing.assert_close(other_end, end, rtol=0, atol=1e-5)
    assert (end - before).abs().max() > 5e-4
    for row in rows[1:]:
        assert row == pytest.approx(rows[0], rel=1e-3, abs=1e-5)
    assert rows[0]["updates"] == (1 if options["batch_size"] == 6 else 4)


@pytest.mark.parametrize("missing", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("normalization", ["batch", "prompt"])
def test_a_missing_reward_leaves_the_gradient_as_if_absent(env, make_agent, roll, missing, normalization):
    options = {"batch_size": NUMBER, "normalization": normalization, "statistics_min_count": 2, "max_grad_norm": 1e9}
    agent, other = make_agent(env, **options), make_agent(env, **options)
    rolled = rewarded(roll(env, agent.policy))
    rolled.rewards[[1, 4, 9]] = missing
    kept = [index for index in range(NUMBER) if index not in (1, 4, 9)]
    metrics, expected = update(agent, rolled), update(other, part_of(rolled, kept))
    assert metrics["samples_dropped"] == 3 and expected["samples_dropped"] == 0
    assert gradients(other).norm() > 0.01
    torch.testing.assert_close(gradients(agent), gradients(other), rtol=1e-4, atol=1e-6)
    assert agent.state() == other.state()


def test_without_one_usable_reward_nothing_is_learned(env, make_agent, roll):
    agent = make_agent(env, normalization="prompt")
    rolled = roll(env, agent.policy)
    rolled.rewards[:] = float("nan")
    rolled.rewards[0] = float("inf")
    before, state = weights(agent), agent.state()
    with pytest.raises(NoUsableReward, match="all 12 rewards of the iteration are NaN or infinite"):
        update(agent, rolled)
    assert torch.equal(weights(agent), before)
    assert agent.state() == state


def test_a_deterministic_sampler_is_refused(make_env):
    policy = DenoisingPolicy.from_env(make_env(eta=0.0))
    with pytest.raises(ValueError, match=r"eta=0.0 makes every denoising step deterministic.*use eta=1"):
        DDPOIS(policy, DDPOIS.Config())


def test_a_floor_of_sigma_makes_a_deterministic_sampler_learn(make_env, make_agent, roll):
    env = make_env(NUMBER, eta=0.0, sigma_min=0.1)
    agent = make_agent(env)
    before = weights(agent)
    update(agent, rewarded(roll(env, agent.policy)))
    assert not torch.equal(weights(agent), before)


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_good_actions_become_more_likely_and_bad_ones_less(env, make_agent, roll, trainable):
    agent = make_agent(env, trainable, batch_size=NUMBER, learning_rate=3e-4)
    rolled = rewarded(roll(env, agent.policy))
    advantages = rolled.rewards - rolled.rewards.mean()
    update(agent, rolled)
    with torch.no_grad():
        change = (log_probs(agent.policy, rolled) - rolled.log_probs).mean(0)
    assert (advantages * change).mean() > 0
    assert change[advantages.topk(4).indices].mean() > change[(-advantages).topk(4).indices].mean()


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_updates_stop_at_the_clip_range(env, make_agent, roll, trainable):
    """Many passes over the same rollout: the clipped surrogate leaves no reason to go on."""
    agent = make_agent(env, trainable, batch_size=NUMBER, inner_epochs=6, clip_range=1e-4)
    rolled = rewarded(roll(env, agent.policy))
    assert update(agent, rolled)["clip_fraction"] > 0.2


def test_a_deterministic_step_is_never_scored(make_env, make_agent, roll, exact_end_pipeline):
    env = make_env(NUMBER, model=str(exact_end_pipeline))
    agent = make_agent(env, batch_size=NUMBER)
    rolled = rewarded(roll(env, agent.policy))
    seen = []
    agent.policy.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs[0]["timestep"].flatten().tolist()))
    metrics = update(agent, rolled)
    assert sorted(seen, reverse=True) == [t for t in (751, 501, 251) for _ in range(NUMBER)]
    assert np.isfinite(metrics["grad_norm"])


def test_every_transition_is_used_once_an_epoch(env, make_agent, roll):
    agent = make_agent(env, batch_size=5, inner_epochs=2, micro_batch_size=7)
    rolled = rewarded(roll(env, agent.policy))
    seen = []
    hook = agent.policy.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    assert update(agent, rolled)["updates"] == 6
    hook.remove()
    actions = torch.cat(seen).flatten(1)
    expected = rolled.latents[1:].flatten(0, 1).flatten(1).repeat(2, 1)
    assert sorted(actions.tolist()) == sorted(expected.tolist())


def test_the_gradient_norm_is_clipped(env, make_agent, roll):
    agent = make_agent(env, batch_size=NUMBER, max_grad_norm=1e-3)
    metrics = update(agent, rewarded(roll(env, agent.policy)))
    assert metrics["grad_norm"] > 0.01  # before clipping
    assert gradients(agent).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_advantages_are_clipped(env, make_agent, roll):
    agent = make_agent(env, advantage_clip=2.0)
    rolled = roll(env, agent.policy)
    rolled.rewards[:] = 0.0
    rolled.rewards[3] = 1e6  # 11 to 1: advantage sqrt(11) = 3.3, the others -1 / sqrt(11)
    assert agent.advantages(rolled) == pytest.approx([-(11**-0.5)] * 3 + [2.0] + [-(11**-0.5)] * 8)


def test_advantages_by_prompt_use_the_prompts(env, make_agent, roll):
    agent = make_agent(env, normalization="prompt", statistics_min_count=2)
    rolled = replace(roll(env, agent.policy), prompts=("a", "b") * 6)
    rolled.rewards[:] = torch.tensor([1.0, 100.0, 3.0, 300.0]).repeat(3)
    assert agent.advantages(rolled) == pytest.approx([-1.0, -1.0, 1.0, 1.0] * 3)


def test_the_same_random_numbers_give_the_same_weights(env, make_agent, roll):
    results = []
    for seed in (0, 0, 1):
        agent = make_agent(env, batch_size=5)
        update(agent, rewarded(roll(env, agent.policy)), seed)
        results.append(weights(agent))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    "name, value",
    [
        ("clip_range", 0.0),
        ("clip_range", -0.1),
        ("learning_rate", 0.0),
        ("batch_size", 0),
        ("inner_epochs", 0),
        ("group_size", 0),
        ("max_grad_norm", 0.0),
    ],
)
def test_an_option_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r} must be larger than 0"):
        DDPOIS.Config(**{name: value})
    with pytest.raises(ValueError, match="learning_rate=nan must be finite"):
        DDPOIS.Config(learning_rate=float("nan"))


def test_the_defaults_are_those_of_the_paper():
    """DDPO, table F.6."""
    config = DDPOIS.Config()
    assert (config.learning_rate, config.weight_decay, config.adam_epsilon) == (1e-5, 1e-4, 1e-8)
    assert (config.adam_beta1, config.adam_beta2, config.max_grad_norm) == (0.9, 0.999, 1.0)
    assert (config.clip_range, config.batch_size) == (1e-4, 64)


def test_it_is_found_by_name():
    assert AGENTS["ddpo_is"] is DDPOIS
    with pytest.raises(ValueError, match="agent='ddpo-is' is unknown; did you mean 'ddpo_is'"):
        AGENTS["ddpo-is"]


def test_advantages_by_component_use_the_components_of_the_reward(env, make_agent, roll):
    """Equal weights of normalised components, although one is a thousand times the other."""
    options = {"normalization": "batch", "component_weights": ("small=1", "large=1")}
    agent = make_agent(env, **options)
    rolled = roll(env, agent.policy)
    small, large = np.random.default_rng(0).normal(size=(2, NUMBER))
    parts = {"small": torch.as_tensor(small), "large": torch.as_tensor(1000 * large)}
    rolled = replace(rolled, rewards=(parts["small"] + parts["large"]).float(), components=parts)
    total = (small - small.mean()) / small.std() + (large - large.mean()) / large.std()
    assert agent.advantages(rolled) == pytest.approx((total - total.mean()) / total.std(), rel=1e-6)
    with pytest.raises(ValueError, match="component_weights='small' is unknown; known: large"):
        agent.advantages(replace(rolled, components={"large": parts["large"]}))
