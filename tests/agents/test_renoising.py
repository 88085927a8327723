"""Finished pictures noised anew: states and actions are diffusers', the gradient a denoising loss's, its noise less."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from agent_updates import close, gradients, log_prob, record, rewarded, slope, update
from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.agents.algorithms import AGENTS, DDPOIS, DDPOISKL, DDPOSF, DPOK
from diffusion_gym.agents.algorithms.policy_gradient import Transitions
from diffusion_gym.agents.renoising import fresh_noise, renoised_transitions
from diffusion_gym.agents.rollout import collect_many

NUMBER, T = 8, 4
RENOISING = {"ddpo_sf": {}, "ddpo_is": {}, "ddpo_iskl": {"kl_form": "closed_form"}}


@pytest.fixture
def env(make_env):
    return make_env(NUMBER)


def every_pair():
    return torch.arange(NUMBER).repeat_interleave(T), torch.arange(T).repeat(NUMBER)


@pytest.mark.parametrize("eta", [1.0, 0.4])
def test_states_and_actions_are_those_of_diffusers(make_env, roll, tiny_pipeline, eta):
    """`add_noise`, and the mean of `step` for a network that predicts the very noise that was added."""
    env = make_env(NUMBER, eta=eta)
    policy = DenoisingPolicy.from_env(env)
    rolled = roll(env, policy)
    samples, steps = every_pair()
    eps = fresh_noise(rolled, NUMBER * T, seed=3)
    observation, actions = renoised_transitions(policy.table, rolled, samples, steps, eps)
    scheduler = DDIMScheduler.from_pretrained(tiny_pipeline, subfolder="scheduler")
    scheduler.set_timesteps(T)
    for row, (sample, step) in enumerate(zip(samples, steps, strict=True)):
        t, noise = scheduler.timesteps[step], eps[row][None]
        state = scheduler.add_noise(rolled.finished[sample][None], noise, t[None])
        action = scheduler.step(noise, t, state, eta=eta, variance_noise=torch.zeros_like(state)).prev_sample
        assert observation["timestep"][row].item() == t
        torch.testing.assert_close(observation["latents"][row][None], state, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(actions[row][None], action, rtol=1e-4, atol=1e-4)
    assert torch.equal(observation["prompt"], rolled.tokens[samples])


def test_the_noise_is_normal_and_the_seeds_own(env, roll):
    rolled = roll(env, DenoisingPolicy.from_env(env))
    noise = fresh_noise(rolled, 1000, seed=1)
    assert torch.equal(noise, fresh_noise(rolled, 1000, seed=1))
    assert not torch.equal(noise, fresh_noise(rolled, 1000, seed=2))
    assert noise.shape == (1000, *rolled.finished.shape[1:])
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("name", ["ddpo_sf", "ddpo_is"])
def test_one_update_follows_the_weighted_denoising_loss(env, make_agent, roll, name, trainable):
    """By hand: grad of the mean of A w_t |eps - eps_theta|^2 / 2, w_t = (d mean / d eps)^2 / sigma_t^2."""
    options = {"agent": AGENTS[name], "batch_size": NUMBER, "max_grad_norm": 1e9, "renoise": True}
    agent = make_agent(env, trainable, **options)
    rolled = rewarded(roll(env, agent.policy))
    rewards = rolled.rewards.double()
    advantages = ((rewards - rewards.mean()) / rewards.std(correction=0)).float()
    batches = record(agent)
    table = agent.policy.table
    update(agent, rolled)
    (batch,) = batches
    steps = table.step_of[batch.observation["timestep"][:, 0]]
    signal, noise, sigma = (c[steps].view(-1, 1, 1, 1) for c in (table.signal, table.noise, table.sigma))
    # The action says which eps it was: mean = c0 x0 + ce eps and x_t = signal x0 + noise eps are two equations.
    c0, ce, cx = (c[steps].view(-1, 1, 1, 1) for c in (table.coef_x0, table.coef_eps, table.coef_xt))
    latents, mean = batch.observation["latents"], batch.action - cx * batch.observation["latents"]
    x0 = (mean * noise - ce * latents) / (c0 * noise - ce * signal)
    eps = (mean * signal - c0 * latents) / (ce * signal - c0 * noise)
    rows = [(rolled.finished - row).flatten(1).norm(dim=1).argmin().item() for row in x0]
    assert sorted(zip(rows, steps.tolist(), strict=True)) == [(n, k) for n in range(NUMBER) for k in range(T)]
    torch.testing.assert_close(x0, rolled.finished[rows], rtol=1e-3, atol=1e-3)
    fresh = make_agent(env, trainable, **options)
    predicted = fresh.policy.predicted_noise(batch.observation)
    weight = ((ce - c0 * noise / signal) / sigma) ** 2
    error = (weight * (eps - predicted) ** 2).flatten(1).mean(1) / 2
    descent = slope((advantages[rows] * error).mean(), fresh.parameters)
    close(gradients(agent), descent, 2e-3)


def test_ratios_are_to_the_policy_before_the_first_update(env, make_agent, roll):
    agent = make_agent(env, batch_size=NUMBER // 2, inner_epochs=2, renoise=True, learning_rate=1e-2)
    before = copy.deepcopy(agent.policy)
    rolled = rewarded(roll(env, agent.policy))
    batches = record(agent)
    metrics = update(agent, rolled)
    assert metrics["updates"] == len(batches) == 4
    for index, batch in enumerate(batches):
        with torch.no_grad():
            expected = log_prob(before, batch.observation, batch.action)
            after = log_prob(agent.policy, batch.observation, batch.action)
        torch.testing.assert_close(batch.old_log_prob, expected, rtol=1e-5, atol=1e-5)
        assert (after - expected).abs().max() > 1e-3, index


def test_a_fresh_policy_has_ratio_1(env, make_agent, roll):
    agent = make_agent(env, "full", batch_size=NUMBER, renoise=True)
    metrics = update(agent, rewarded(roll(env, agent.policy)))
    assert metrics["clip_fraction"] == 0
    assert 0 <= metrics["approx_kl"] < 1e-9


def test_each_pass_has_noise_of_its_own(env, make_agent, roll):
    agent = make_agent(env, batch_size=NUMBER, inner_epochs=2, renoise=True)
    batches = record(agent)
    update(agent, rewarded(roll(env, agent.policy)))
    first, second = (batch.observation["latents"].flatten(1) for batch in batches)
    assert len(first) == len(second) and torch.cdist(first, second).min() > 0.1


@pytest.mark.parametrize("name", RENOISING)
def test_the_result_does_not_depend_on_the_micro_batch(env, make_agent, roll, name):
    found = []
    for micro in (3, 64):
        agent = make_agent(
            env,
            agent=AGENTS[name],
            batch_size=5,
            micro_batch_size=micro,
            adam_epsilon=1e-3,
            renoise=True,
            **RENOISING[name],
        )
        update(agent, rewarded(roll(env, agent.policy)))
        found.append(gradients(agent))
    close(found[0], found[1], 1e-3)


def test_micro_batches_that_do_not_fit_are_halved_before_the_first_update(env, make_agent, roll):
    agent = make_agent(env, batch_size=NUMBER, micro_batch_size=0, renoise=True)
    forward, sizes = agent.policy.forward, []

    def limited(observation, action):
        sizes.append(len(action))
        if len(action) > 9:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(observation, action)

    agent.policy.forward = limited
    update(agent, rewarded(roll(env, agent.policy)))
    assert sizes[:3] == [32, 16, 8] and set(sizes[3:]) == {8}


def test_a_sample_without_reward_is_left_out(env, make_agent, roll):
    agent = make_agent(env, batch_size=NUMBER, renoise=True)
    rolled = rewarded(roll(env, agent.policy))
    rolled.rewards[2] = torch.nan
    batches = record(agent)
    metrics = update(agent, rolled)
    assert metrics["samples_dropped"] == 1
    assert len(batches[0].advantage) == T * (NUMBER - 1) and batches[0].advantage.isfinite().all()


def test_the_gradient_is_less_noisy_than_that_of_sampled_transitions():
    """On the embedded model, steps of the noisy half: squared norm of a sample's gradient, for advantages of +-1."""
    env = gym.make_vec("DiffusionDenoise-Shapes-Composition-v0", num_envs=8, guidance_scale=1.0, num_inference_steps=10)
    policy = DenoisingPolicy.from_env(env, trainable="full")
    rolled = collect_many(env, policy, 8, (0, 0))
    parameters = list(policy.trainable_parameters().values())
    squares = {"sampled": [], "renoised": []}
    for sample in range(8):
        samples, steps = torch.full((5,), sample), torch.arange(5)
        eps = fresh_noise(rolled, 5, seed=sample)
        for kind, (states, actions) in {
            "sampled": (rolled.states(samples, steps), rolled.actions(samples, steps)),
            "renoised": renoised_transitions(policy.table, rolled, samples, steps, eps),
        }.items():
            squares[kind].append(slope(policy(states, actions).mean(), parameters).square().sum().item())
    assert np.mean(squares["renoised"]) < 0.5 * np.mean(squares["sampled"])


def test_transitions_made_by_hand_are_the_agents(env, make_agent, roll):
    agent = make_agent(env, renoise=True)
    rolled = roll(env, agent.policy)
    eps, old = fresh_noise(rolled, 6, seed=0), torch.arange(6.0)
    items = torch.tensor([[3, 1, 5], [0, 2, 0]])
    made = Transitions.renoised(agent.policy.table, rolled, torch.arange(8.0), eps, old, items)
    states, actions = renoised_transitions(agent.policy.table, rolled, items[:, 0], items[:, 1], eps[[5, 0]])
    assert torch.equal(made.action, actions) and torch.equal(made.observation["latents"], states["latents"])
    assert made.old_log_prob.tolist() == [5, 0] and made.advantage.tolist() == [3, 0]


def test_the_sampled_form_of_the_penalty_refuses_it():
    with pytest.raises(ValueError, match="kl_form='squared_log_ratio' estimates.*use kl_form='closed_form'"):
        DDPOISKL.Config(renoise=True)
    assert DDPOISKL.Config(renoise=True, kl_form="closed_form").renoise


def test_dpok_refuses_it():
    with pytest.raises(ValueError, match="renoise=True is not for DPOK"):
        DPOK.Config(renoise=True)


@pytest.mark.parametrize("agent", [DDPOIS, DDPOSF])
def test_it_is_off_by_default(agent):
    assert agent.Config().renoise is False
