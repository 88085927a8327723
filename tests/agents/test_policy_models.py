"""SDXL and Stable Diffusion 3 behind the same policy: ratio 1, divergence, training, and the environment's rules."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from diffusion_gym.agents.algorithms import DDPOIS, RWR
from diffusion_gym.models import null_embedding
from diffusion_gym.scheduling import guide
from diffusion_gym.testing.conformance import check_vector_env
from diffusion_gym.testing.random_xl_sd3 import write_random_sd3, write_random_sdxl

NUMBER, STEPS = 6, 4
WRITERS = {"sdxl": write_random_sdxl, "sd3": write_random_sd3}


@pytest.fixture(scope="module", params=WRITERS)
def folder(request, tmp_path_factory):
    return str(WRITERS[request.param](tmp_path_factory.mktemp("models") / request.param))


@pytest.fixture
def make(make_env, folder):
    """`make(**keywords)`: an environment on the model."""
    return lambda **keywords: make_env(NUMBER, model=folder, **keywords)


def pairs(rolled):
    """States, actions and log-probs of all transitions, shuffled: batches of mixed timesteps, as in training."""
    order = torch.randperm(NUMBER * STEPS, generator=torch.Generator().manual_seed(1))
    samples, steps = order % NUMBER, order // NUMBER
    return rolled.states(samples, steps), rolled.actions(samples, steps), rolled.log_probs[steps, samples]


def rescored(policy, rolled):
    """Log-probs of all actions `(T, N)`, in the batches of the rollout."""
    number = torch.arange(NUMBER)
    at = [torch.full_like(number, step) for step in range(STEPS)]
    return torch.stack([policy(rolled.states(number, step), rolled.actions(number, step)) for step in at]).detach()


def test_the_environment_keeps_the_rules(folder):
    def make(**keywords):
        prompts = ["a red circle", "two blue stars"]
        return gym.make_vec("DiffusionDenoise-v0", model=folder, prompts=prompts, num_inference_steps=2, **keywords)

    check_vector_env(make)


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_the_ratio_of_a_fresh_rollout_is_1(make, make_policy, roll, trainable, guidance):
    env = make(guidance_scale=guidance)
    policy = make_policy(env, trainable)
    rolled = roll(env, policy)
    assert ((rescored(policy, rolled) - rolled.log_probs).exp() - 1).abs().max() <= 1e-6
    assert rolled.log_probs.std() > 0.1 and policy.stochastic_steps.tolist() == list(range(STEPS))
    states, actions, log_probs = pairs(rolled)
    assert (policy(states, actions) - log_probs).abs().max() <= 1e-5


@pytest.mark.parametrize("half", [{"dtype": "bfloat16"}, {}], ids=["weights", "autocast"])
def test_in_bfloat16_the_ratio_is_well_inside_the_clip_range(make, make_policy, roll, half):
    env = make(**half)
    policy = make_policy(env)
    if not half:
        policy.set_training(mixed_precision="bf16")
    rolled = roll(env, policy)
    assert rolled.latents.dtype == rolled.log_probs.dtype == torch.float32
    assert (rescored(policy, rolled) - rolled.log_probs).abs().max() <= 1e-6


@torch.no_grad()
def test_the_mean_is_the_guided_one_of_two_calls_of_the_network(make, make_policy, roll):
    """The empty prompt in one call, the prompts in another; x_t by x0 and the noise that the output stands for."""
    env = make(guidance_scale=3.0)
    policy = make_policy(env)
    rolled = roll(env, policy)
    model, table, samples = policy.model, policy.table, torch.arange(NUMBER)
    states = rolled.states(samples, torch.full_like(samples, 1))
    x, t = states["latents"], table.network_timesteps[1].expand(NUMBER)
    calls = [
        model.predict(policy.unet, x, t, embeddings)
        for embeddings in (model.embed(model.tokenize(rolled.prompts)), null_embedding(model).expand(NUMBER, -1, -1))
    ]
    output = guide(*calls, 3.0)
    signal, noise = table.signal[1], table.noise[1]
    x0 = x - noise * output if table.prediction == "flow" else (x - noise * output) / signal
    expected = table.coef_x0[1] * x0 + table.coef_eps[1] * (x - signal * x0) / noise
    distribution = policy.distribution(states)
    torch.testing.assert_close(distribution.mean, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(policy.denoised(states), x0, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(policy.predicted_noise(states), (x - signal * x0) / noise, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_the_divergence_from_the_reference(make, make_policy, roll, trainable):
    env = make()
    fresh, moved = make_policy(env, trainable, scale=0.0), make_policy(env, trainable)
    states, *_ = pairs(roll(env, fresh))
    reference = fresh.reference_distribution(states)
    assert fresh.distribution(states).kl(reference).max() <= 1e-6
    assert torch.equal(moved.reference_distribution(states).mean, reference.mean)
    found = moved.distribution(states)
    expected = ((found.mean - reference.mean) ** 2).sum((1, 2, 3)) / (2 * found.std.flatten() ** 2)
    torch.testing.assert_close(found.kl(reference), expected, rtol=1e-5, atol=0)
    assert (expected > 1e-5).all() and expected.mean() > 1e-2


def test_adapters_are_on_every_attention_projection(make, make_policy):
    policy = make_policy(make())
    wanted = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    layers = {name for name, _ in policy.model.unet.named_modules() if name.endswith(wanted)}
    assert {name.split(".lora_")[0] for name in policy.trainable_parameters()} == layers
    assert len(layers) >= 8


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_update_of_ddpo_raises_the_probability_of_what_was_rewarded(make, make_agent, trainable, checkpointing):
    env = make()
    agent = make_agent(env, trainable, agent=DDPOIS, batch_size=NUMBER, gradient_checkpointing=checkpointing)
    rolled = agent.sample(env, NUMBER, (0,))
    before = rescored(agent.policy, rolled)
    metrics = agent.update(rolled, np.random.default_rng(0))
    assert np.isfinite(list(metrics.values())).all()
    advantages = (rolled.rewards - rolled.rewards.mean()) / rolled.rewards.std(correction=0)
    assert ((rescored(agent.policy, rolled) - before) * advantages).mean() > 0


def test_a_regression_agent_learns_from_noised_pictures(make, make_agent):
    env = make()
    agent = make_agent(env, agent=RWR, batch_size=NUMBER, updates=2)
    trajectories = agent.sample(env, NUMBER, (0,))
    before = torch.cat([parameter.detach().flatten() for parameter in agent.parameters])
    metrics = agent.update(trajectories, np.random.default_rng(0))
    assert np.isfinite(list(metrics.values())).all() and metrics["denoising_error"] > 0
    assert not torch.equal(torch.cat([parameter.detach().flatten() for parameter in agent.parameters]), before)


def test_without_noise_a_policy_gradient_is_refused(make, make_agent):
    with pytest.raises(ValueError, match=r"eta=0.0 makes every denoising step deterministic"):
        make_agent(make(eta=0.0), agent=DDPOIS)
