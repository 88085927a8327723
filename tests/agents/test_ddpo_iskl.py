"""DDPO_ISKL: DDPO_IS plus a penalty that pulls to the pretrained model, each form against torch.distributions."""

from dataclasses import replace

import pytest
import torch

from agent_updates import close, gradients, penalties, rewarded, slope, transitions, update, weights
from diffusion_gym.agents.algorithms import DDPOIS, DDPOISKL

TRAINABLE = ["lora", "full"]
FORMS = ["squared_log_ratio", "closed_form", "unscaled"]
NUMBER = 8


@pytest.fixture
def env(make_env):
    return make_env(NUMBER)


@pytest.fixture
def pretrained(env, make_policy):
    """The pretrained model as a policy of its own: adapters that have not moved change nothing."""
    return make_policy(env, scale=0.0)


@pytest.mark.parametrize("form", FORMS)
def test_without_weight_it_is_importance_sampling(env, make_agent, roll, form):
    """Over several clipped minibatches, where the ratio leaves 1."""
    shared = {"batch_size": 3, "inner_epochs": 2, "clip_range": 5e-4, "adam_epsilon": 1e-3}
    agent = make_agent(env, agent=DDPOISKL, kl_weight=0.0, kl_form=form, **shared)
    other = make_agent(env, agent=DDPOIS, **shared)
    before = weights(agent)
    rolled = rewarded(roll(env, agent.policy))
    metrics, expected = update(agent, rolled), update(other, rolled)
    assert metrics["clip_fraction"] > 0.05 and metrics["kl_penalty"] > 0
    assert {key: metrics[key] for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-7)
    close(weights(agent) - before, weights(other) - before, 1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("trainable", TRAINABLE)
def test_the_gradient_is_the_sum_of_both(env, make_agent, pretrained, roll, trainable, form):
    shared = {"batch_size": NUMBER, "max_grad_norm": 1e9}
    agent = make_agent(env, trainable, agent=DDPOISKL, kl_weight=0.0, kl_form=form, **shared)
    other = make_agent(env, trainable, agent=DDPOIS, **shared)
    rolled = rewarded(roll(env, agent.policy))
    penalty = penalties(agent.policy, pretrained, *transitions(rolled), form).mean()
    pull = slope(penalty, agent.parameters)
    expected = update(other, rolled)
    weight = (gradients(other).norm() / pull.norm()).item()  # so that both count
    agent.config = replace(agent.config, kl_weight=weight)
    metrics = update(agent, rolled)
    close(gradients(agent) - gradients(other), weight * pull, 1e-3)
    assert metrics["kl_penalty"] == pytest.approx(rolled.latents[0, 0].numel() * penalty.item(), rel=1e-3)  # in nats
    assert metrics["loss"] == pytest.approx(expected["loss"] + weight * penalty.item(), rel=1e-3, abs=1e-5)
    assert metrics["approx_kl"] == pytest.approx(expected["approx_kl"], abs=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("trainable", TRAINABLE)
def test_the_penalty_alone_leads_back_to_the_pretrained_model(env, make_agent, pretrained, roll, trainable, form):
    agent = make_agent(env, trainable, agent=DDPOISKL, kl_form=form, kl_weight=1.0, learning_rate=6e-4, batch_size=8)
    rolled = roll(env, agent.policy)
    rolled.rewards[:] = 1.0  # no advantages
    assert not agent.advantages(rolled).any()

    @torch.no_grad()
    def distance(kind):
        return penalties(agent.policy, pretrained, *transitions(rolled), kind).mean()

    before, divergence = distance(form), distance("closed_form")
    for seed in range(3):
        update(agent, rolled, seed)
    assert distance(form) < 0.9 * before
    assert distance("closed_form") < 0.995 * divergence


@pytest.mark.parametrize("form", FORMS)
def test_at_the_pretrained_model_there_is_no_penalty(env, make_agent, roll, form):
    agent = make_agent(env, scale=0.0, agent=DDPOISKL, kl_form=form, kl_weight=1e3, batch_size=NUMBER)
    other = make_agent(env, scale=0.0, agent=DDPOIS, batch_size=NUMBER)
    rolled = rewarded(roll(env, agent.policy))
    metrics, expected = update(agent, rolled), update(other, rolled)
    assert metrics["kl_penalty"] == 0
    assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_the_reference_stays_the_pretrained_model(env, make_agent, pretrained, roll, trainable):
    agent = make_agent(env, trainable, agent=DDPOISKL, learning_rate=1e-2, batch_size=4)
    rolled = rewarded(roll(env, agent.policy))
    states, _ = transitions(rolled)
    base = agent.policy.model.unet
    before = {name: value.clone() for name, value in base.state_dict().items()}
    update(agent, rolled)
    after = base.state_dict()
    frozen = [name for name in before if "lora" not in name]
    assert frozen and all(torch.equal(before[name], after[name]) for name in frozen)
    with torch.no_grad():
        torch.testing.assert_close(
            agent.policy.reference_distribution(states).mean, pretrained.distribution(states).mean, rtol=0, atol=1e-5
        )
        assert (agent.policy.distribution(states).mean - pretrained.distribution(states).mean).abs().max() > 0.01


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("kl_weight", -0.1, "kl_weight=-0.1 must be at least 0"),
        ("kl_weight", float("nan"), "kl_weight=nan must be finite"),
        ("kl_form", "kl", "kl_form='kl' must be one of squared_log_ratio, closed_form, unscaled"),
        ("clip_range", 0.0, "clip_range=0.0 must be larger than 0"),
    ],
)
def test_an_option_out_of_range_is_named(name, value, message):
    with pytest.raises(ValueError, match=message):
        DDPOISKL.Config(**{name: value})
