"""Rollouts with the adapters merged into the weights."""

import pytest
import torch

from diffusion_gym.agents.algorithms import DDPOIS
from diffusion_gym.agents.rollout import collect_many
from diffusion_gym.models.lora import adapters_merged


@pytest.fixture
def policy(make_env, make_policy):
    return make_policy(make_env(4, guidance_scale=3.0))


def test_inside_the_network_predicts_the_same_with_other_weights(policy, make_env):
    observation, _ = make_env(4).reset(seed=0)
    pretrained = {name: value.clone() for name, value in policy.model.unet.state_dict().items()}
    before, reference = policy.distribution(observation).mean, policy.reference_distribution(observation).mean
    assert not torch.allclose(before, reference)
    with torch.no_grad(), adapters_merged(policy.unet):
        torch.testing.assert_close(policy.distribution(observation).mean, before)
        assert torch.equal(policy.reference_distribution(observation).mean, reference)
        assert all(torch.equal(value, pretrained[name]) for name, value in policy.model.unet.state_dict().items())
        shared = {id(value) for value in policy.model.unet.parameters()}
        own = [name for name, value in policy.unet.named_parameters() if "lora" not in name and id(value) not in shared]
        assert own and all("attn" in name for name in own)
    assert torch.equal(policy.distribution(observation).mean, before)
    assert {id(value) for value in policy.unet.parameters()} >= shared
    assert list(policy.trainable_parameters()) and all("lora" in name for name in policy.trainable_parameters())


def test_an_error_inside_leaves_the_adapters_as_they_were(policy, make_env):
    observation, _ = make_env(4).reset(seed=0)
    before = policy.distribution(observation).mean
    with pytest.raises(RuntimeError, match="stop"), adapters_merged(policy.unet):
        raise RuntimeError("stop")
    assert torch.equal(policy.distribution(observation).mean, before)
    policy.distribution(observation).mean.sum().backward()
    assert any(value.grad is not None and value.grad.any() for value in policy.trainable_parameters().values())


def test_ratio_of_a_fresh_rollout_is_one_up_to_rounding(make_env, make_policy):
    env = make_env(4, guidance_scale=3.0)
    policy = make_policy(env)
    apart = collect_many(env, policy, 4, (0, 0))
    policy.set_training(merge_adapters=True)
    merged = collect_many(env, policy, 4, (0, 0))
    torch.testing.assert_close(merged.latents, apart.latents)
    assert not torch.equal(merged.latents, apart.latents)  # another rounding: the option did something
    steps, samples = (part.flatten() for part in torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"))
    chosen = torch.isin(steps, policy.stochastic_steps)
    steps, samples = steps[chosen], samples[chosen]
    new = policy(merged.states(samples, steps), merged.actions(samples, steps))
    assert ((new - merged.log_probs[steps, samples]).exp() - 1).abs().max() <= 1e-5


def test_half_precision_is_refused(policy):
    with pytest.raises(ValueError, match=r"merge_adapters=True needs float32, .*mixed_precision='bf16'"):
        policy.set_training(merge_adapters=True, mixed_precision="bf16")
    with pytest.raises(ValueError, match="merge_adapters=True"):
        DDPOIS(policy, DDPOIS.Config(merge_adapters=True, mixed_precision="bf16"))


def test_without_adapters_it_is_refused(make_env, make_policy):
    with pytest.raises(ValueError, match="merge_adapters=True has nothing to merge with trainable='full'"):
        make_policy(make_env(4), "full").set_training(merge_adapters=True)
