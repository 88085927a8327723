"""DGPO and online DPO: gradients worked by hand, groups that share noise and step, and who is compared with whom."""

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from agent_updates import close, gradients, log_prob, rewarded, slope, update
from diffusion_gym.agents.advantages import best_and_worst
from diffusion_gym.agents.algorithms import DGPO, NoUsableReward, OnlineDPO
from diffusion_gym.agents.renoising import squared_error
from toy_policy import BEHAVIOUR, REFERENCE, THETA, arrays, toy_agent, toy_batch

ADVANTAGES = [1.2, -0.4, 0.7, -1.5, 0.3, -0.3]
NAN = float("nan")


@pytest.fixture
def env(make_env):
    return make_env(12, num_inference_steps=3, eta=0.0)


@pytest.mark.parametrize("prediction", ["flow", "epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("kind", [DGPO, OnlineDPO])
def test_the_gradient_is_the_one_by_hand(kind, prediction):
    """Luo-Yihong/DGPO, scripts/train_sd3_dgpo.py: w_g A d with d fixed beyond the clip range, and a KL."""
    clip = {"clip_range": 0.02} if kind is DGPO else {}
    agent = toy_agent(kind, prediction, kl_weight=0.3, **clip)
    batch = toy_batch(agent.policy, ADVANTAGES)
    batch.fixed["reference"] = agent.policy.prediction(batch.observation, reference=True)
    batch.fixed["margin"] = torch.tensor([-0.8, 0.4, -0.8, 0.4, 1.7, 1.7], dtype=torch.float64)
    rows = agent.losses(batch)
    found = torch.autograd.grad(rows["loss"].sum(), agent.policy.theta)[0]
    wanted, beyond = np.zeros(2), []
    margins = batch.fixed["margin"].numpy()
    for (k, x, _, target, *_), advantage, margin in zip(arrays(agent.policy, batch), ADVANTAGES, margins, strict=True):
        ratio = np.exp(((BEHAVIOUR[k] * x - target) ** 2).mean() - ((THETA[k] * x - target) ** 2).mean())
        stops = kind is DGPO and (ratio > 1.02 if advantage > 0 else ratio < 0.98)
        weight = 1 / (1 + np.exp(-margin))
        wanted[k] += 0 if stops else weight * advantage * (2 * (THETA[k] * x - target) * x).mean()
        wanted[k] += 0.3 * (2 * (THETA[k] - REFERENCE[k]) * x**2).mean()
        beyond.append(stops)
    np.testing.assert_allclose(found, wanted, rtol=1e-10)
    assert kind is OnlineDPO or 0 < sum(beyond) < 6


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("micro", [2, 64])
def test_an_update_follows_the_logistic_loss_of_the_groups(env, make_agent, trainable, micro):
    """Autograd of mean_g -log sigmoid(-beta / G sum A (d - d_ref)) times G / beta, whatever the micro-batches."""
    options = {"group_size": 4, "preference_scale": 30.0, "micro_batch_size": micro, "max_grad_norm": 1e9}
    agent = make_agent(env, trainable, agent=DGPO, batch_size=12, kl_weight=0.0, normalization="group", **options)
    rolled = rewarded(agent.sample(env, 12, (0, 0)))
    seen, noised = [], agent.noised
    agent.noised = lambda *given: seen.append(noised(*given)) or seen[-1]
    other = make_agent(env, trainable, agent=DGPO, group_size=4)
    metrics = update(agent, rolled)
    assert metrics["clip_fraction"] == 0
    (noise,) = seen
    assert len(noise.items) == 36 and noise.items[:, 2].max() == 8  # three groups at three steps
    batch, rows = noise.at(noise.items), noise.items[:, 2]
    error = squared_error(other.policy.prediction(batch.observation), batch.target)
    reference = squared_error(other.policy.prediction(batch.observation, reference=True), batch.target)
    sums = torch.zeros(9).index_add(0, rows, batch.advantage * (error - reference))
    value = -logsigmoid(-30.0 / 4 * sums)
    close(gradients(agent), slope(value.mean() * 9 / 36 * 4 / 30.0, other.parameters), 2e-3)
    assert metrics["preference_loss"] == pytest.approx(value.mean().item(), rel=1e-3)


def test_a_group_shares_noise_and_steps_and_misses_what_has_no_reward(env, make_agent):
    agent = make_agent(env, agent=DGPO, group_size=4, batch_size=9, timestep_fraction=0.67, normalization="group")
    rolled = rewarded(agent.sample(env, 12, (0, 0)))
    rolled.rewards[5] = torch.nan
    seen, losses = [], agent.losses
    agent.losses = lambda batch: seen.append(batch) or losses(batch)
    metrics = update(agent, rolled)
    assert metrics["samples_dropped"] == 1 and metrics["updates"] == 2  # of two groups and of one
    sizes = []
    for batch in seen:
        noises, counts = batch.target.flatten(1).unique(dim=0, return_counts=True)
        sizes += counts.tolist()
        for noise in noises:
            same = (batch.target.flatten(1) == noise).all(1)
            assert len(batch.observation["step"][same].unique()) == 1
            assert len(batch.clean[same].flatten(1).unique(dim=0)) == same.sum()
            assert len(batch.fixed["margin"][same].unique()) == 1
    assert sorted(sizes) == [3, 3, 4, 4, 4, 4]


def test_the_behaviour_policy_follows_every_update(env, make_agent):
    agent = make_agent(env, agent=DGPO, group_size=4, batch_size=4, behaviour_growth=0.1, learning_rate=1e-2)
    steps, follow = [], agent.behaviour.follow
    agent.behaviour.follow = lambda decay: steps.append(decay) or follow(decay)
    update(agent, rewarded(agent.sample(env, 12, (0, 0))))
    assert steps == pytest.approx([0.1, 0.2, 0.3])


# --- online DPO --------------------------------------------------------------------------------------------------


def test_the_best_and_the_worst_of_each_group():
    rewards = np.array([1.0, 3.0, 2.0, 5.0, 5.0, 5.0, NAN, 2.0, 4.0, NAN, NAN, 7.0])
    found = best_and_worst(rewards, 3)
    np.testing.assert_array_equal(found, [-1, 1, NAN, NAN, NAN, NAN, NAN, -1, 1, NAN, NAN, NAN])
    np.testing.assert_array_equal(best_and_worst(np.array([2.0, 2.0, NAN, 1.0, 1.0, 1.0]), 3), [0, 0, NAN, 0, 0, 0])


@pytest.mark.parametrize("form", ["denoising_error", "step"])
def test_an_update_follows_the_loss_of_dpo(make_env, make_agent, form):
    """Diffusion-DPO's code: -log sigmoid(-beta / 2 [...]) of errors; D3PO's: of log-probabilities of the steps."""
    env = make_env(12, num_inference_steps=3)
    options = {"agent": OnlineDPO, "batch_size": 12, "group_size": 4, "max_grad_norm": 1e9, "preference_scale": 6.0}
    agent, other = (make_agent(env, "full", form=form, **options) for _ in range(2))
    rolled = rewarded(agent.sample(env, 12, (0, 0)))
    seen, noised = [], agent.noised
    agent.noised = lambda *given: seen.append(noised(*given)) or seen[-1]
    metrics = update(agent, rolled)
    (noise,) = seen
    batch, total = noise.at(noise.items), 0.0
    samples, steps = noise.items[:, 0], noise.items[:, 1]
    if form == "step":
        actions = rolled.actions(samples, steps)
        errors = -log_prob(other.policy, batch.observation, actions)
        means = other.policy.reference_distribution(batch.observation)
        references = -means.log_prob(actions)
    else:
        errors = squared_error(other.policy.prediction(batch.observation), batch.target)
        references = squared_error(other.policy.prediction(batch.observation, reference=True), batch.target)
    change = errors - references
    for group in rolled.rewards.view(3, 4).argsort(1) + 4 * torch.arange(3)[:, None]:
        worst, best = group[0], group[-1]
        for step in range(3):
            won, lost = (change[(samples == sample) & (steps == step)] for sample in (best, worst))
            assert len(won) == len(lost) == 1
            total = total - logsigmoid(-3.0 * (won - lost)).sum()
    assert len(noise.items) == 18
    close(gradients(agent), slope(total / 18 / 3.0, other.parameters), 2e-3)
    assert metrics["preference_loss"] == pytest.approx(total.item() / 9, rel=1e-3)


def test_steps_need_a_stochastic_sampler(env, make_agent):
    with pytest.raises(ValueError, match="eta=0.0 makes every denoising step deterministic"):
        make_agent(env, agent=OnlineDPO, form="step")


def test_without_two_rewards_in_a_group_nothing_is_learned(env, make_agent):
    agent = make_agent(env, agent=DGPO, group_size=2)
    rolled = agent.sample(env, 12, (0, 0))
    rolled.rewards[:] = torch.nan
    with pytest.raises(NoUsableReward, match="all 12 rewards"):
        update(agent, rolled)


@pytest.mark.parametrize("kind", [DGPO, OnlineDPO])
def test_an_option_out_of_its_range_is_named(kind):
    for name, value in (("group_size", 1), ("preference_scale", 0.0), ("reference", "old")):
        with pytest.raises(ValueError, match=f"{name}={value!r} (must|to) be"):
            kind.Config(**{name: value})
