"""The policy: one Gaussian in rollout and training, a reference that stays put, weights shared under LoRA."""

import gymnasium as gym
import pytest
import torch
from diffusers import DDIMScheduler

from diffusion_gym.agents import DenoisingDistribution, DenoisingPolicy

TRAINABLE = ["lora", "full"]


def all_pairs(rolled):
    """Samples and steps of every transition of a rollout."""
    number, steps = len(rolled), len(rolled.timesteps)
    return torch.arange(number).repeat(steps), torch.arange(steps).repeat_interleave(number)


def score(policy, rolled, samples, steps):
    return policy(rolled.states(samples, steps), rolled.actions(samples, steps))


def rescore(policy, rolled):
    """Log-probs of all actions `(T, N)`, in the batches of the rollout."""
    number = torch.arange(len(rolled))
    steps = range(len(rolled.timesteps))
    return torch.stack([score(policy, rolled, number, torch.full_like(number, step)) for step in steps]).detach()


def rescore_mixed(policy, rolled, batch=7):
    """The same in shuffled batches of mixed timesteps, as training does."""
    samples, steps = all_pairs(rolled)
    result = torch.empty_like(rolled.log_probs)
    for part in torch.randperm(len(steps), generator=torch.Generator().manual_seed(1)).split(batch):
        result[steps[part], samples[part]] = score(policy, rolled, samples[part], steps[part]).detach()
    return result


def observe(policy, rolled, step=1):
    samples = torch.arange(len(rolled))
    return rolled.states(samples, torch.full_like(samples, step))


def take_a_step(policy, rolled, lr=1e-2):
    """One AdamW step on some log-probs."""
    optimizer = torch.optim.AdamW(policy.trainable_parameters().values(), lr=lr)
    score(policy, rolled, *all_pairs(rolled)).sum().backward()
    optimizer.step()


def copies(tensors):
    return {name: value.detach().clone() for name, value in tensors}


# --- ratio = 1 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", TRAINABLE)
@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_ratio_of_a_fresh_rollout_is_1(make_env, make_policy, roll, trainable, guidance, reduction):
    env = make_env(6, num_inference_steps=10, guidance_scale=guidance, log_prob_reduction=reduction)
    policy = make_policy(env, trainable)
    rolled = roll(env, policy)
    ratio = (rescore(policy, rolled) - rolled.log_probs).exp()
    assert (ratio - 1).abs().max() <= 1e-6
    assert rolled.log_probs.std() > 0.1


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("trainable", TRAINABLE)
def test_the_ratio_stays_1_in_other_batches(make_env, make_policy, roll, trainable, sampler):
    """Kernels round by batch; what is left is far inside DDPO's clip range of 1e-4."""
    env = make_env(5, num_inference_steps=5, sampler=sampler)
    policy = make_policy(env, trainable)
    rolled = roll(env, policy)
    for batch in (1, 7, 64):
        assert (rescore_mixed(policy, rolled, batch) - rolled.log_probs).abs().max() <= 1e-5


def test_in_bfloat16_the_ratio_is_well_inside_the_clip_range(make_env, make_policy, roll):
    env = make_env(6, num_inference_steps=10, dtype="bfloat16")
    policy = make_policy(env)
    assert next(policy.model.unet.parameters()).dtype == torch.bfloat16
    rolled = roll(env, policy)
    assert rolled.latents.dtype == rolled.log_probs.dtype == torch.float32
    assert (rescore(policy, rolled) - rolled.log_probs).abs().max() <= 1e-6
    assert (rescore_mixed(policy, rolled) - rolled.log_probs).abs().max() <= 1e-5


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_mixed_timesteps_in_one_call_equal_one_by_one(make_env, make_policy, roll, trainable):
    env = make_env(3, num_inference_steps=5)
    policy = make_policy(env, trainable)
    rolled = roll(env, policy)
    samples, steps = all_pairs(rolled)
    together = policy.distribution(rolled.states(samples, steps))
    for row in range(len(steps)):
        alone = policy.distribution(rolled.states(samples[row : row + 1], steps[row : row + 1]))
        torch.testing.assert_close(together.mean[row], alone.mean[0], rtol=1e-5, atol=1e-5)
        assert together.std[row] == alone.std[0]
    expected = torch.cat([score(policy, rolled, samples[r : r + 1], steps[r : r + 1]) for r in range(len(steps))])
    torch.testing.assert_close(score(policy, rolled, samples, steps), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_the_policy_stays_in_eval_mode(make_env, make_policy, roll, trainable):
    env = make_env()
    policy = make_policy(env, trainable)
    dropouts = [module for module in policy.unet.modules() if isinstance(module, torch.nn.Dropout)]
    assert dropouts
    for dropout in dropouts:
        dropout.p = 0.9
    rolled = roll(env, policy)
    assert policy.train() is policy
    policy.train(True)
    assert not any(module.training for module in policy.modules())
    assert torch.equal(rescore(policy, rolled), rolled.log_probs)


def test_forward_is_the_log_prob_of_the_distribution(make_env, make_policy, roll):
    env = make_env()
    policy = make_policy(env)
    rolled = roll(env, policy)
    samples, steps = all_pairs(rolled)
    states, actions = rolled.states(samples, steps), rolled.actions(samples, steps)
    distribution = policy.distribution(states)
    assert torch.equal(policy(states, actions), distribution.log_prob(actions))
    std = distribution.std.expand_as(distribution.mean)
    expected = torch.distributions.Normal(distribution.mean, std).log_prob(actions).mean((1, 2, 3))
    torch.testing.assert_close(policy(states, actions), expected, rtol=1e-5, atol=1e-5)


# --- the reference ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_before_any_update_the_policy_is_the_reference(make_env, make_policy, roll, trainable):
    env = make_env()
    policy = make_policy(env, trainable, scale=0.0)
    states = observe(policy, roll(env, policy))
    distribution, reference = policy.distribution(states), policy.reference_distribution(states)
    assert torch.equal(distribution.mean, reference.mean)
    assert distribution.kl(reference).tolist() == [0.0] * 4


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_the_reference_stays_put(make_env, make_policy, roll, trainable):
    env = make_env()
    policy = make_policy(env, trainable, scale=0.0)
    rolled = roll(env, policy)
    states = observe(policy, rolled)
    before = policy.reference_distribution(states)
    take_a_step(policy, rolled)
    take_a_step(policy, rolled)
    after, distribution = policy.reference_distribution(states), policy.distribution(states)
    assert torch.equal(before.mean, after.mean) and torch.equal(before.std, after.std)
    expected = ((distribution.mean - before.mean) ** 2).sum((1, 2, 3)) / (2 * before.std.flatten() ** 2)
    torch.testing.assert_close(distribution.kl(after), expected, rtol=1e-5, atol=0)
    assert (expected > 1e-4).all()
    squared = ((distribution.mean - before.mean) ** 2).sum((1, 2, 3))
    torch.testing.assert_close(distribution.kl(after, denominator=False), squared, rtol=1e-5, atol=0)


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_asking_for_the_reference_leaves_the_policy_trainable(make_env, make_policy, roll, trainable):
    env = make_env()
    policy = make_policy(env, trainable)
    states = observe(policy, roll(env, policy))
    before = policy.distribution(states).mean
    reference = policy.reference_distribution(states)
    assert not reference.mean.requires_grad
    after = policy.distribution(states)
    assert torch.equal(before, after.mean)
    after.kl(reference).sum().backward()
    gradients = {name: parameter.grad for name, parameter in policy.trainable_parameters().items()}
    assert all(value is not None and value.isfinite().all() for value in gradients.values())
    assert any(value.abs().max() > 0 for value in gradients.values())


def test_the_reference_comes_back_even_after_an_error(make_env, make_policy, roll):
    env = make_env()
    policy = make_policy(env)
    states = observe(policy, roll(env, policy))
    before = policy.distribution(states).mean
    with pytest.raises(ValueError):
        policy.reference_distribution({**states, "timestep": torch.full((4, 1), 2)})
    assert torch.equal(policy.distribution(states).mean, before)


# --- weights ---------------------------------------------------------------------------------------------------


def test_lora_shares_the_weights_of_the_base(make_env, make_policy):
    policy = make_policy()
    base = {parameter.data_ptr() for parameter in policy.model.unet.parameters()}
    frozen = {p.data_ptr() for name, p in policy.unet.named_parameters() if "lora_" not in name}
    assert frozen == base and len(base) > 50
    adapters = policy.trainable_parameters()
    assert adapters and all("lora_" in name for name in adapters)
    assert {name.split(".lora_")[0].split(".")[-1] for name in adapters} == {"to_q", "to_k", "to_v", "0"}
    assert not base & {parameter.data_ptr() for parameter in adapters.values()}
    assert not any("lora_" in name for name, _ in policy.model.unet.named_parameters())


def test_full_training_shares_nothing(make_policy):
    policy = make_policy(trainable="full")
    base = dict(policy.model.unet.named_parameters())
    own = policy.trainable_parameters()
    assert own.keys() == base.keys()
    assert not {p.data_ptr() for p in base.values()} & {p.data_ptr() for p in own.values()}
    assert not any(parameter.requires_grad for parameter in base.values())


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_an_optimizer_step_leaves_the_pretrained_model_bit_identical(make_env, make_policy, roll, trainable):
    env = make_env()
    policy = make_policy(env, trainable)
    rolled = roll(env, policy)
    states = observe(policy, rolled)
    base, own = copies(policy.model.unet.named_parameters()), copies(policy.trainable_parameters().items())
    output = policy.distribution(states).mean
    take_a_step(policy, rolled)
    assert all(torch.equal(value, base[name]) for name, value in policy.model.unet.named_parameters())
    assert not any(torch.equal(value, own[name]) for name, value in policy.trainable_parameters().items())
    assert not torch.equal(policy.distribution(states).mean, output)


def test_two_policies_of_one_model_do_not_disturb_each_other(make_env, make_policy, roll):
    env = make_env()
    first, second = make_policy(env), make_policy(env, "full")
    rolled = roll(env, first)
    states = observe(first, rolled)
    before = second.distribution(states).mean
    take_a_step(first, rolled)
    assert torch.equal(second.distribution(states).mean, before)


@pytest.mark.parametrize("rank", [1, 3])
def test_the_rank_of_the_adapters(make_policy, rank):
    policy = make_policy(lora_rank=rank)
    for name, parameter in policy.trainable_parameters().items():
        assert parameter.shape[0 if "lora_A" in name else 1] == rank
        assert parameter.dtype == torch.float32


def test_adapters_train_in_float32_on_a_bfloat16_base(make_env, make_policy):
    policy = make_policy(make_env(dtype="bfloat16"))
    assert {parameter.dtype for parameter in policy.trainable_parameters().values()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_full_training_in_half_precision_does_not_lose_the_updates(make_env, dtype):
    """A step of 1e-5 is below the resolution of weights of 0.1 in 8 or 11 bits: refuse it, or keep float32 weights."""
    try:
        policy = DenoisingPolicy.from_env(make_env(dtype=dtype), trainable="full")
    except ValueError as error:
        assert "float32" in str(error)
        return
    optimizer = torch.optim.AdamW(policy.trainable_parameters().values(), lr=1e-5, weight_decay=0.0)
    before = copies(policy.trainable_parameters().items())
    for parameter in policy.trainable_parameters().values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = torch.cat([(before[n] != p).flatten() for n, p in policy.trainable_parameters().items()])
    assert moved.float().mean() > 0.99


# --- guidance --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", TRAINABLE)
@pytest.mark.parametrize("guidance", [0.0, 1.0, 7.0])
@torch.no_grad()
def test_the_guided_mean_by_two_calls_of_the_network_and_diffusers(make_env, make_policy, roll, trainable, guidance):
    env = make_env(guidance_scale=guidance)
    policy = make_policy(env, trainable)
    rolled = roll(env, policy)
    model, states = policy.model, observe(policy, rolled)
    t, x = states["timestep"][0, 0], states["latents"]
    assert (states["timestep"] == t).all()

    def network(prompts):
        embeddings = model.text_encoder(model.tokenize(prompts)).last_hidden_state
        return policy.unet(x, t, encoder_hidden_states=embeddings).sample.double()

    eps = guidance * network(list(rolled.prompts)) + (1 - guidance) * network([""] * 4)
    scheduler = DDIMScheduler.from_config(model.scheduler_config)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(4)
    expected = scheduler.step(eps, t, x.double(), eta=1.0, variance_noise=torch.zeros_like(eps)).prev_sample
    torch.testing.assert_close(policy.distribution(states).mean.double(), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_bfloat16_network_leaves_the_state_in_float32(make_env, make_policy, roll):
    """x_t enters the mean itself, not only the network: rounding it there would shift the mean by 0.4 %."""
    env = make_env(guidance_scale=1.0, dtype="bfloat16", prompts=["a red circle"])
    policy = make_policy(env)
    states = observe(policy, roll(env, policy))
    t, x = states["timestep"][0, 0], states["latents"]
    embeddings = policy.model.text_encoder(policy.model.tokenize(["a red circle"])).last_hidden_state
    eps = policy.unet(x.bfloat16(), t, encoder_hidden_states=embeddings.repeat(4, 1, 1)).sample.double()
    scheduler = DDIMScheduler.from_config(policy.model.scheduler_config)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(4)
    expected = scheduler.step(eps, t, x.double(), eta=1.0, variance_noise=torch.zeros_like(eps)).prev_sample
    torch.testing.assert_close(policy.distribution(states).mean.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("guidance, batches", [(1.0, [4]), (1, [4]), (5.0, [8]), (0.0, [8])])
def test_without_guidance_the_network_runs_once_on_each_state(make_env, make_policy, roll, guidance, batches):
    env = make_env(guidance_scale=guidance)
    policy = make_policy(env)
    states = observe(policy, roll(env, policy))
    seen = []
    policy.unet.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    policy.distribution(states)
    assert seen == batches


def test_each_state_is_scored_with_its_own_prompt(make_env, make_policy, roll):
    env = make_env(prompts=["a red circle", "two blue stars"])
    policy = make_policy(env)
    rolled = roll(env, policy)
    states = observe(policy, rolled)
    states["latents"] = states["latents"][:1].expand(4, -1, -1, -1)
    means = {}
    for prompts in (["a red circle", "two blue stars"] * 2, ["two blue stars"] * 3 + ["a red circle"]):
        mean = policy.distribution({**states, "prompt": policy.model.tokenize(prompts)}).mean
        for prompt, value in zip(prompts, mean, strict=True):
            torch.testing.assert_close(value, means.setdefault(prompt, value), rtol=1e-5, atol=1e-5)
    assert (means["a red circle"] - means["two blue stars"]).abs().max() > 1e-3


# --- construction and errors -----------------------------------------------------------------------------------


def test_the_policy_holds_the_sampler_of_the_environment(make_env, tiny_pipeline):
    env = make_env(guidance_scale=3.0)
    assert DenoisingPolicy.from_env(env).config is env.unwrapped.sampler_config
    single = gym.make(
        "DiffusionDenoise-v0", model=str(tiny_pipeline), prompts=["a red circle"], num_inference_steps=3, eta=0.7
    )
    policy = DenoisingPolicy.from_env(single)
    assert policy.config is single.unwrapped.vector.sampler_config
    assert (policy.config.eta, len(policy.table)) == (0.7, 3)


def test_a_single_environment_can_be_played(make_policy, tiny_pipeline):
    env = gym.make("DiffusionDenoise-v0", model=str(tiny_pipeline), prompts=["a red circle"], num_inference_steps=3)
    policy = DenoisingPolicy.from_env(env)
    observation, _ = env.reset(seed=0)
    ended = False
    for _ in range(3):
        assert not ended
        batch = {key: value[None] for key, value in observation.items()}
        observation, _, ended, _, info = env.step(policy.distribution(batch).sample()[0].numpy())
    assert ended and info["image"].shape == (8, 8, 3)


def test_numpy_observations_are_read_as_tensors_are(make_env, make_policy, roll):
    env = make_env()
    policy = make_policy(env)
    states = observe(policy, roll(env, policy))
    expected = policy.distribution(states)
    found = policy.distribution({key: value.numpy() for key, value in states.items()})
    assert torch.equal(found.mean, expected.mean)


@pytest.mark.parametrize("strange", [0, 2, 999, 1000])
def test_a_timestep_that_the_sampler_does_not_visit_is_named(make_env, make_policy, roll, strange):
    env = make_env()
    policy = make_policy(env)
    states = observe(policy, roll(env, policy))
    states["timestep"] = torch.tensor([[751], [strange], [501], [1]])
    with pytest.raises(
        ValueError, match=rf"\['timestep'\] holds \[{strange}\]; the sampler visits \[751, 501, 251, 1\]"
    ):
        policy.distribution(states)


def test_the_observation_of_a_finished_episode_is_refused(make_env, make_policy, roll):
    env = make_env(autoreset_mode="Disabled")
    policy = make_policy(env)
    observation, _ = env.reset(seed=0)
    for _ in range(4):
        observation, *_ = env.step(policy.distribution(observation).sample())
    with pytest.raises(ValueError, match="timestep"):
        policy.distribution(observation)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"trainable": "adapter"}, "trainable='adapter' must be 'lora' or 'full'"),
        ({"trainable": "lora", "lora_rank": 0}, "lora_rank=0 must be at least 1"),
        ({"trainable": "lora", "lora_rank": -4}, "lora_rank=-4 must be at least 1"),
    ],
)
def test_bad_options_are_named(make_env, options, message):
    with pytest.raises(ValueError, match=message):
        DenoisingPolicy.from_env(make_env(), **options)


@pytest.mark.parametrize("make", [gym.make, gym.make_vec])
def test_an_environment_that_denoises_nothing_is_refused(make):
    with pytest.raises(ValueError, match="is no denoising environment"):
        DenoisingPolicy.from_env(make("CartPole-v1"))


# --- sampling and degenerate steps -----------------------------------------------------------------------------


def test_samples_are_mean_plus_std_times_noise():
    mean = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    std = torch.tensor([0.5, 0.0]).view(2, 1, 1, 1)
    action = DenoisingDistribution(mean, std, "mean").sample(torch.Generator().manual_seed(3))
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    assert torch.equal(action, mean.detach() + std * noise)
    assert torch.equal(action[1], mean[1].detach()) and not action.requires_grad


def test_sigma_min_is_in_the_samples_and_in_the_scores(make_env, make_policy, roll):
    env = make_env(64, sigma_min=0.5, eta=0.0)
    policy = make_policy(env)
    rolled = roll(env, policy)
    assert policy.stochastic_steps.tolist() == [0, 1, 2, 3]
    distribution = policy.distribution(observe(policy, rolled, step=3))
    noise = (rolled.latents[4] - distribution.mean) / 0.5
    assert noise.std().item() == pytest.approx(1, abs=0.03)
    expected = torch.distributions.Normal(distribution.mean, 0.5).log_prob(rolled.latents[4]).mean((1, 2, 3))
    torch.testing.assert_close(rolled.log_probs[3], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_a_deterministic_last_step_is_outside_the_gradient(make_env, make_policy, roll, exact_end_pipeline, trainable):
    env = make_env(model=str(exact_end_pipeline))
    policy = make_policy(env, trainable)
    assert policy.stochastic_steps.tolist() == [0, 1, 2]
    rolled = roll(env, policy)
    assert rolled.log_probs[3].tolist() == [0.0] * 4 and (rolled.log_probs[:3] != 0).all()
    distribution = policy.distribution(observe(policy, rolled, step=3))
    assert torch.equal(rolled.latents[4], distribution.mean)
    gradients = torch.autograd.grad(
        distribution.log_prob(rolled.latents[4] + 1).sum(), list(policy.trainable_parameters().values())
    )
    assert all((gradient == 0).all() for gradient in gradients)
    score(policy, rolled, *all_pairs(rolled)).sum().backward()
    assert all(p.grad.isfinite().all() for p in policy.trainable_parameters().values())


def test_a_prompt_first_seen_in_inference_mode_can_be_trained_on(make_env, make_policy, roll):
    env = make_env()
    policy = make_policy(env)
    with torch.inference_mode():
        rolled = roll(env, policy)
    states = {key: value.clone() for key, value in observe(policy, rolled).items()}
    policy(states, rolled.latents[2].clone()).sum().backward()
    assert any(p.grad.abs().max() > 0 for p in policy.trainable_parameters().values())
