"""The weights of the policy: shared under LoRA, its own else; and the pretrained reference, which stays put."""

import pytest
import torch

from diffusion_gym.agents import DenoisingPolicy

TRAINABLE = ["lora", "full"]


def observe(rolled, step=1):
    samples = torch.arange(len(rolled))
    return rolled.states(samples, torch.full_like(samples, step))


def take_a_step(policy, rolled):
    """One AdamW step on some log-probs."""
    optimizer = torch.optim.AdamW(policy.trainable_parameters().values(), lr=1e-2)
    steps = range(len(rolled.timesteps))
    sum(policy(observe(rolled, step), rolled.latents[step + 1]).sum() for step in steps).backward()
    optimizer.step()


def copies(tensors):
    return {name: value.detach().clone() for name, value in tensors}


# --- the reference ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_before_any_update_the_policy_is_the_reference(make_env, make_policy, roll, trainable):
    env = make_env()
    policy = make_policy(env, trainable, scale=0.0)
    states = observe(roll(env, policy))
    with torch.no_grad():
        distribution, reference = policy.distribution(states), policy.reference_distribution(states)
    assert torch.equal(distribution.mean, reference.mean)
    assert distribution.kl(reference).tolist() == [0.0] * 4


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_the_reference_stays_put(make_env, make_policy, roll, trainable):
    env = make_env()
    policy = make_policy(env, trainable, scale=0.0)
    rolled = roll(env, policy)
    states = observe(rolled)
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
    states = observe(roll(env, policy))
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
    states = observe(roll(env, policy))
    before = policy.distribution(states).mean
    del states["step"]
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
    states = observe(rolled)
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
    states = observe(rolled)
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
