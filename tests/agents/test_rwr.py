"""RWR and sparse RWR: the loss against diffusers and a hand-written regression, the updates, the one-step process."""

import copy
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.agents.advantages import softmax_weights, threshold_weights
from diffusion_gym.agents.algorithms import AGENTS, RWR, NoUsableReward, SparseRWR
from diffusion_gym.agents.training.checkpoint import Checkpoints, Progress
from diffusion_gym.testing.random_pipeline import write_random_pipeline

AGENT_CLASSES = [RWR, SparseRWR]
TRAINABLE = ["lora", "full"]
NUMBER = 12
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def env(make_env):
    return make_env(NUMBER)


@pytest.fixture
def make(make_agent):
    """`make(env, trainable, agent=RWR, **options)`, with few updates and a gradient that is not clipped."""

    def made(env, trainable="lora", **options):
        defaults = {"agent": RWR, "batch_size": 8, "updates": 3, "max_grad_norm": 1e9}
        return make_agent(env, trainable, **{**defaults, **options})

    return made


def sampled(agent, env, seed=0, rewards=None):
    """An iteration's pictures, with rewards of a wide spread."""
    trajectories = agent.sample(env, env.num_envs, (seed,))
    if rewards is None:
        rewards = 5 * torch.randn(len(trajectories), generator=torch.Generator().manual_seed(seed + 7))
    return replace(trajectories, rewards=torch.as_tensor(rewards, dtype=torch.float32))


def weights(agent):
    return torch.cat([parameter.detach().flatten() for parameter in agent.parameters])


def spied(agent):
    """The arguments of every call of `agent.losses` from now on: samples, steps, noise and weights."""
    seen, losses = [], agent.losses

    def spy(trajectories, *arguments):
        seen.append(tuple(argument.clone() for argument in arguments))
        return losses(trajectories, *arguments)

    agent.losses = spy
    return seen


def by_hand(policy, trajectories, samples, steps, noise, *, conditional_only=False):
    """||eps - eps_theta(x_t, t, c)||^2 / dimensions, `(M,)`: x_t and the step to eps by diffusers' scheduler."""
    model = policy.model
    scheduler = DDIMScheduler.from_config(model.scheduler_config)
    scheduler.set_timesteps(policy.config.num_inference_steps)
    times = scheduler.timesteps[steps]
    x_t = scheduler.add_noise(trajectories.finished[samples], noise, times)
    prompts = [trajectories.prompts[sample] for sample in samples.tolist()]
    output = model.predict(policy.unet, x_t, times, model.embed(model.tokenize(prompts)))
    if not conditional_only:
        null = model.predict(policy.unet, x_t, times, model.embed(model.tokenize([""] * len(prompts))))
        scale = policy.config.guidance_scale
        output = scale * output + (1 - scale) * null  # DDPO, equation (5)
    rows = []
    for index, t in enumerate(times):
        x0 = scheduler.step(output[index], t, x_t[index]).pred_original_sample
        alpha_bar = scheduler.alphas_cumprod[t]
        predicted = (x_t[index] - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
        rows.append(((noise[index] - predicted) ** 2).mean())
    return torch.stack(rows)


def gradient(agent, value):
    return torch.cat([part.flatten() for part in torch.autograd.grad(value, agent.parameters)])


def close(found, wanted, tolerance=1e-4):
    assert wanted.norm() > 1e-3
    assert (found - wanted).norm() <= tolerance * wanted.norm()


def test_the_agents_use_their_weights_and_the_defaults_are_the_papers(env, make):
    """DDPO, table F.6."""
    prompts, rewards = ("a", "b", "a", "c", "b", "a", "a", "b"), np.array([1.0, -3.0, 7.0, 2.0, 4.5, -20.0, 7.5, 4.5])
    for agent, function, option in ((RWR, softmax_weights, 0.2), (SparseRWR, threshold_weights, 0.9)):
        config = agent.Config()
        assert (config.batch_size, config.updates, config.learning_rate, config.weight_decay) == (128, 400, 1e-5, 1e-4)
        found = make(env, agent=agent).weights(prompts, rewards)
        np.testing.assert_array_equal(found, function(prompts, rewards, option))
    other = make(env, inverse_temperature=0.7).weights(prompts, rewards)
    np.testing.assert_array_equal(other, softmax_weights(prompts, rewards, 0.7))
    other = make(env, agent=SparseRWR, percentile=0.3).weights(prompts, rewards)
    np.testing.assert_array_equal(other, threshold_weights(prompts, rewards, 0.3))


# --- the loss --------------------------------------------------------------------------------------------------


@pytest.fixture
def items():
    """Samples, steps, noise and weights of ten noised pictures."""
    generator = torch.Generator().manual_seed(3)
    samples = torch.randint(0, NUMBER, (10,), generator=generator)
    steps = torch.arange(10) % 4
    return samples, steps, torch.randn(10, 4, 4, 4, generator=generator), torch.rand(10, generator=generator)


@pytest.mark.parametrize("trainable", TRAINABLE)
@pytest.mark.parametrize("guided", [True, False], ids=["guided", "conditional"])
def test_the_loss_is_the_weighted_denoising_error(env, make, items, trainable, guided):
    agent = make(env, trainable, cfg_training=guided)
    trajectories = sampled(agent, env)
    samples, steps, noise, factor = items
    rows = agent.losses(trajectories, *items)
    error = by_hand(agent.policy, trajectories, samples, steps, noise, conditional_only=not guided)
    torch.testing.assert_close(rows["denoising_error"], error, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows["loss"], factor * error, rtol=1e-4, atol=1e-5)
    close(gradient(agent, rows["loss"].sum()), gradient(agent, (factor * error).sum()))
    assert not rows["denoising_error"].requires_grad


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("clip", [False, True])
def test_the_noise_is_found_from_other_predictions(make_env, make, items, tmp_path, prediction, clip):
    """With `clip_sample` as well: what is fitted is the prediction, not its clamped version."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers would like every scheduler to be Stable Diffusion's
        folder = write_random_pipeline(tmp_path, prediction_type=prediction, clip_sample=clip)
    env = make_env(NUMBER, model=str(folder))
    agent = make(env, "full")
    trajectories = sampled(agent, env)
    agent.policy.model.scheduler_config["clip_sample"] = False  # the reference's; the policy has its own table
    error = by_hand(agent.policy, trajectories, *items[:3])
    rows = agent.losses(trajectories, *items)
    torch.testing.assert_close(rows["denoising_error"], error, rtol=1e-3, atol=1e-4)
    close(gradient(agent, rows["loss"].sum()), gradient(agent, (items[3] * error).sum()), 1e-3)


def test_an_unconditional_model_can_be_fitted(make_env, make, items):
    model = copy.copy(make_env(1).unwrapped.model)
    predict, text = model.predict, torch.zeros(1, 3, 16)
    model.prompt_length = model.vocab_size = 0
    model.predict = lambda unet, x, t, _: predict(unet, x, t, text.expand(len(x), -1, -1))
    env = make_env(NUMBER, model=model)
    agent = make(env)
    trajectories = sampled(agent, env)
    assert trajectories.tokens is None
    samples, steps, noise, factor = items
    alpha_bar = DDIMScheduler.from_config(model.scheduler_config).alphas_cumprod[env.unwrapped.step_table.timesteps]
    alpha_bar = alpha_bar[steps].view(-1, 1, 1, 1)
    x_t = alpha_bar.sqrt() * trajectories.finished[samples] + (1 - alpha_bar).sqrt() * noise
    predicted = model.predict(agent.policy.unet, x_t, env.unwrapped.step_table.timesteps[steps], None)
    wanted = factor * (noise - predicted).square().flatten(1).mean(1)
    torch.testing.assert_close(agent.losses(trajectories, *items)["loss"], wanted, rtol=1e-4, atol=1e-5)
    before = weights(agent)
    agent.update(trajectories, np.random.default_rng(0))
    assert not torch.equal(weights(agent), before)


# --- the updates -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("agent_class", AGENT_CLASSES)
@pytest.mark.parametrize("trainable", TRAINABLE)
def test_an_update_follows_the_gradient_of_the_weighted_regression(env, make, agent_class, trainable):
    """The mean over a minibatch of w ||eps - eps_theta||^2, w scaled to a mean of 1 over the samples that count."""
    agent = make(env, trainable, agent=agent_class, updates=1, batch_size=16)
    trajectories = sampled(agent, env)
    kinds = {RWR: lambda p, r: softmax_weights(p, r, 0.2), SparseRWR: lambda p, r: threshold_weights(p, r, 0.9)}
    expected = kinds[agent_class](trajectories.prompts, trajectories.rewards.double().numpy())
    original, seen = copy.deepcopy([p.detach().clone() for p in agent.parameters]), spied(agent)
    metrics = agent.update(trajectories, np.random.default_rng(0))
    [(samples, steps, noise, factor)] = seen
    wanted = torch.as_tensor(expected / expected[expected > 0].mean())[samples].float()
    torch.testing.assert_close(factor, wanted)
    found = torch.cat([parameter.grad.flatten() for parameter in agent.parameters])
    with torch.no_grad():
        for parameter, value in zip(agent.parameters, original, strict=True):
            parameter.copy_(value)
    error = by_hand(agent.policy, trajectories, samples, steps, noise)
    loss = (wanted * error).mean()
    close(found, gradient(agent, loss))
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert metrics["denoising_error"] == pytest.approx(error.mean().item(), rel=1e-4)
    assert metrics["effective_samples"] == pytest.approx(expected.sum() ** 2 / (expected**2).sum())
    assert (metrics["updates"], metrics["samples_dropped"]) == (1, 0)


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_the_result_does_not_depend_on_the_micro_batch(env, make, trainable):
    ends, rows = [], []
    for micro in (1, 3, 64):
        agent = make(env, trainable, micro_batch_size=micro, adam_epsilon=1e-3)
        before = weights(agent)
        rows.append(agent.update(sampled(agent, env), np.random.default_rng(0)))
        ends.append(weights(agent) - before)
    for move, row in zip(ends[1:], rows[1:], strict=True):
        close(move, ends[0], 5e-4)
        assert row == pytest.approx(rows[0], rel=1e-3)


@pytest.mark.parametrize(("updates", "batch_size"), [(1, 5), (7, 5), (4, 40)])
def test_updates_run_over_shuffled_passes(env, make, updates, batch_size):
    """As many updates as asked for, each of the same size; no sample twice before every other has been used."""
    agent = make(env, updates=updates, batch_size=batch_size)
    seen = spied(agent)
    metrics = agent.update(sampled(agent, env), np.random.default_rng(0))
    assert metrics["updates"] == len(seen) == updates
    assert {int(row["step"]) for row in agent.optimizer.adam.state.values()} == {updates}
    samples = torch.cat([part[0] for part in seen])
    assert [len(part[0]) for part in seen] == [batch_size] * updates
    passes = samples.split(NUMBER)
    assert all(len(set(each.tolist())) == len(each) for each in passes)
    if len(passes) > 2:
        assert passes[0].tolist() != passes[1].tolist() != sorted(passes[1].tolist())


def test_every_picture_gets_noise_and_a_step_of_its_own(env, make):
    agent = make(env, updates=20, batch_size=60, trained_steps=(0.25, 1.0), micro_batch_size=60)
    agent.minimize = lambda items, losses, count: losses(items) and {"loss": torch.zeros(())}
    seen = spied(agent)
    agent.update(sampled(agent, env), np.random.default_rng(0))
    steps, noise = torch.cat([part[1] for part in seen]), torch.cat([part[2] for part in seen])
    shares = torch.bincount(steps, minlength=4) / len(steps)
    assert shares[0] == 0 and (shares[1:] - 1 / 3).abs().max() < 0.06
    assert len(noise.flatten(1).unique(dim=0)) == len(noise) == 1200
    assert noise.mean().abs() < 4 / noise.numel() ** 0.5
    assert noise.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("agent_class", AGENT_CLASSES)
def test_samples_without_weight_are_never_used(env, make, agent_class):
    agent = make(env, agent=agent_class, updates=6)
    rewards = torch.arange(float(NUMBER))
    rewards[[2, 5, 11]] = torch.tensor([NAN, INF, -INF])
    trajectories = sampled(agent, env, rewards=rewards)
    counted = np.flatnonzero(agent.weights(trajectories.prompts, rewards.double().numpy()))
    seen = spied(agent)
    metrics = agent.update(trajectories, np.random.default_rng(0))
    alone = {10}  # the only usable sample of its prompt
    assert set(torch.cat([part[0] for part in seen]).tolist()) == set(counted.tolist()) - alone
    assert metrics["samples_alone"] == 1 and len(counted) < NUMBER and not {2, 5, 11} & set(counted.tolist())
    assert metrics["samples_dropped"] == 3
    assert weights(agent).isfinite().all()


@pytest.mark.parametrize("agent_class", AGENT_CLASSES)
def test_without_one_usable_reward_nothing_is_learned(env, make, agent_class):
    agent = make(env, agent=agent_class)
    before = weights(agent)
    with pytest.raises(NoUsableReward, match="all 12 rewards"):
        agent.update(sampled(agent, env, rewards=[NAN] * 11 + [INF]), np.random.default_rng(0))
    assert torch.equal(weights(agent), before)


@pytest.mark.parametrize("trainable", TRAINABLE)
@pytest.mark.parametrize("agent_class", AGENT_CLASSES)
def test_the_model_moves_towards_the_pictures_with_high_rewards(env, make, agent_class, trainable):
    """Two agents get the same two kinds of pictures and opposite rewards: each denoises its own kind better."""
    options = {"inverse_temperature": 1.0} if agent_class is RWR else {"percentile": 0.5}
    options |= {"learning_rate": {"lora": 3e-2, "full": 5e-3}[trainable]}
    generator = torch.Generator().manual_seed(9)
    samples, steps = torch.arange(NUMBER).repeat(20), torch.arange(4).repeat_interleave(NUMBER * 5)
    noise = torch.randn(len(samples), 4, 4, 4, generator=generator)
    pictures = 3 * torch.where(torch.arange(NUMBER) % 2 == 0, 1, -1).view(1, -1, 1, 1, 1).expand(1, -1, 4, 4, 4)
    errors = []
    for high in (0, 1, None):
        agent = make(env, trainable, agent=agent_class, updates=12, batch_size=32, **options)
        rewards = 10.0 * (torch.arange(NUMBER) % 2 == high)
        trajectories = replace(sampled(agent, env, rewards=rewards), prompts=("",) * NUMBER, latents=pictures.float())
        if high is not None:
            agent.update(trajectories, np.random.default_rng(0))
        with torch.no_grad():
            found = agent.losses(trajectories, samples, steps, noise, torch.ones(len(samples)))["loss"]
        errors.append([found[samples % 2 == parity].mean() for parity in (0, 1)])
    even, odd, before = errors
    assert even[0] < 0.985 * before[0] and odd[1] < 0.985 * before[1]
    assert even[0] < odd[0] and odd[1] < even[1]


def test_an_interrupted_run_goes_on_bit_for_bit(env, make, tmp_path):
    def iterate(agent, iteration):
        agent.fraction_done = iteration / 4
        agent.update(sampled(agent, env, iteration), np.random.default_rng([0, iteration]))

    options = {"ema_decay": 0.9, "learning_rate_schedule": "warmup_cosine"}
    agent = make(env, **options)
    iterate(agent, 0)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(agent, Progress(1, NUMBER))
    restored = make(env, scale=0.5, **options)
    assert checkpoints.load(restored) == Progress(1, NUMBER)
    for iteration in (1, 2):
        iterate(agent, iteration)
        iterate(restored, iteration)
    assert torch.equal(weights(restored), weights(agent))
    assert all(map(torch.equal, restored.average.average, agent.average.average))


@pytest.mark.parametrize("agent_class", AGENT_CLASSES)
def test_prompts_that_all_come_once_are_refused(env, make, agent_class):
    """The weight of such a sample is 1 whatever its reward."""
    agent = make(env, agent=agent_class)
    trajectories = replace(sampled(agent, env), prompts=tuple(f"prompt {index}" for index in range(NUMBER)))
    before = weights(agent)
    with pytest.raises(ValueError, match="each of the 12 samples .* is the only one of its prompt.*--agent.group-size"):
        agent.update(trajectories, np.random.default_rng(0))
    assert torch.equal(weights(agent), before)


@pytest.mark.parametrize("agent_class", AGENT_CLASSES)
def test_a_sample_that_is_the_only_usable_one_of_its_prompt_is_left_out(env, make, agent_class):
    agent = make(env, agent=agent_class, percentile=0.0) if agent_class is SparseRWR else make(env)
    trajectories = sampled(agent, env, rewards=[1.0, 2.0, 9.0, NAN, *range(8)])
    trajectories = replace(trajectories, prompts=("a", "a", "b", "b", "c", *("d",) * 7))
    seen = spied(agent)
    metrics = agent.update(trajectories, np.random.default_rng(0))
    assert (metrics["samples_alone"], metrics["samples_dropped"]) == (2, 1)
    assert set(torch.cat([samples for samples, *_ in seen]).tolist()) == {0, 1, 5, 6, 7, 8, 9, 10, 11}


@pytest.mark.parametrize("agent_class", AGENT_CLASSES)
def test_groups_share_a_prompt(env, make, agent_class):
    agent = make(env, agent=agent_class, group_size=4)
    prompts = agent.sample(env, 2 * NUMBER, (0,)).prompts
    assert all(len(set(prompts[start : start + 4])) == 1 for start in range(0, 2 * NUMBER, 4))
    with pytest.raises(ValueError, match="group_size=0 must be larger than 0"):
        agent_class.Config(group_size=0)


# --- the one-step process --------------------------------------------------------------------------------------


@pytest.mark.parametrize("agent_class", AGENT_CLASSES)
def test_only_the_finished_pictures_are_kept(env, make, roll, agent_class):
    agent = make(env, agent=agent_class)
    trajectories = agent.sample(env, 2 * NUMBER, (0,))
    assert trajectories.latents.shape == (1, 2 * NUMBER, 4, 4, 4)
    assert trajectories.log_probs.numel() == trajectories.timesteps.numel() == 0
    pictures = env.unwrapped.model.decode(trajectories.finished)
    torch.testing.assert_close(trajectories.rewards, pictures.mean((1, 2, 3)))
    assert len(trajectories.finished.flatten(1).unique(dim=0)) == 2 * NUMBER


@pytest.mark.parametrize("name", sorted(AGENTS))
def test_without_a_stochastic_step_only_agents_on_finished_pictures_work(make_env, make_agent, name):
    env = make_env(NUMBER, eta=0.0)
    policy = DenoisingPolicy.from_env(env)
    if AGENTS[name].needs_stochastic_steps:
        with pytest.raises(ValueError, match=r"eta=0.0 makes every denoising step deterministic"):
            AGENTS[name](policy, AGENTS[name].Config())
        return
    fewer = {"updates": 3} if "updates" in AGENTS[name].Config.__dataclass_fields__ else {}
    agent = make_agent(env, agent=AGENTS[name], batch_size=8, **fewer)
    assert agent.steps.tolist() == [0, 1, 2, 3]
    trajectories, before = sampled(agent, env), weights(agent)
    assert torch.equal(agent.sample(env, NUMBER, (0,)).finished, trajectories.finished)
    assert np.isfinite(list(agent.update(trajectories, np.random.default_rng(0)).values())).all()
    assert not torch.equal(weights(agent), before)


@pytest.mark.parametrize(
    "agent_class, name, value, message",
    [
        (RWR, "updates", 0, "must be larger than 0"),
        (RWR, "batch_size", 0, "must be larger than 0"),
        (RWR, "inverse_temperature", -0.1, "must be a number of at least 0"),
        (RWR, "inverse_temperature", NAN, "must be finite"),
        (SparseRWR, "percentile", 1.0, "must be at least 0 and less than 1"),
        (SparseRWR, "percentile", 90, "must be at least 0 and less than 1"),
        (SparseRWR, "percentile", NAN, "must be finite"),
    ],
)
def test_an_option_out_of_range_is_named(agent_class, name, value, message):
    with pytest.raises(ValueError, match=f"{name}={value!r} {message}"):
        agent_class.Config(**{name: value})
