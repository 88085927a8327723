"""The policy: one Gaussian, in the rollout that samples from it and in the training that scores it."""

import pytest
import torch

from diffusion_gym.agents import DenoisingDistribution

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


def observe(rolled, step=1):
    samples = torch.arange(len(rolled))
    return rolled.states(samples, torch.full_like(samples, step))


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
    torch.testing.assert_close(rescore(policy, rolled), rolled.log_probs, rtol=0, atol=1e-6)


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
    distribution = policy.distribution(observe(rolled, step=3))
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
    distribution = policy.distribution(observe(rolled, step=3))
    torch.testing.assert_close(rolled.latents[4], distribution.mean)
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
    states = {key: value.clone() for key, value in observe(rolled).items()}
    policy(states, rolled.latents[2].clone()).sum().backward()
    assert any(p.grad.abs().max() > 0 for p in policy.trainable_parameters().values())
