"""The value function: what it looks at, and that it can be fitted."""

import pytest
import torch

from diffusion_gym.agents.value import ValueNetwork

FEATURES, TOKENS, STEPS = 6, 5, 1000


def network(features=FEATURES, channels=4, width=16):
    torch.manual_seed(0)
    return ValueNetwork(channels, features, STEPS, width)


def states(number, shape=(4, 8, 8), features=FEATURES, seed=0):
    """x_t, t and text embeddings."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(number, *shape, generator=generator)
    timesteps = torch.randint(0, STEPS, (number,), generator=generator)
    embeddings = torch.randn(number, TOKENS, features, generator=generator) if features else None
    return latents, timesteps, embeddings


@pytest.mark.parametrize("shape", [(4, 4, 4), (4, 8, 8), (4, 64, 64), (4, 5, 7), (3, 32, 32)])
@pytest.mark.parametrize("number", [1, 5])
def test_a_value_for_each_state(shape, number):
    values = network(channels=shape[0])(*states(number, shape))
    assert values.shape == (number,) and values.dtype == torch.float32 and values.isfinite().all()


def test_an_unconditional_model_has_no_prompt():
    values = network(0)(*states(4, features=0))
    assert values.shape == (4,) and values.isfinite().all()


def test_half_precision_embeddings_are_read():
    latents, timesteps, embeddings = states(4)
    exact, rounded = (network()(latents, timesteps, each) for each in (embeddings, embeddings.bfloat16()))
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, atol=1e-2, rtol=0)


@pytest.mark.parametrize("part", range(3), ids=["latents", "time", "prompt"])
def test_it_looks_at_latents_time_and_prompt(part):
    given, other = list(states(4)), states(4, seed=1)
    value = network()
    before = value(*given)
    given[part] = other[part]
    assert ((value(*given) - before).abs() > 1e-5).all()


def test_it_looks_at_every_token_and_at_every_corner():
    latents, timesteps, embeddings = states(1)
    for given in (latents, embeddings):
        given.requires_grad_()
    network()(latents, timesteps, embeddings).sum().backward()
    assert (embeddings.grad.abs().sum(-1) > 0).all()
    assert (latents.grad[0, :, [0, 0, -1, -1], [0, -1, 0, -1]].abs() > 0).all()


def test_it_knows_where_things_are():
    """A picture and its mirror image have other values: a mean over all places would not tell."""
    latents = torch.zeros(2, 4, 8, 8)
    latents[0, :, :, :4], latents[1, :, :, 4:] = 3.0, 3.0
    _, timesteps, embeddings = states(1)
    left, right = network()(latents, timesteps.expand(2), embeddings.expand(2, -1, -1))
    assert abs(left - right) > 1e-4


def test_all_timesteps_are_told_apart():
    latents, _, embeddings = states(1)
    values = network()(latents.expand(STEPS, -1, -1, -1), torch.arange(STEPS), embeddings.expand(STEPS, -1, -1))
    assert len(set(values.tolist())) > 0.9 * STEPS


def test_rows_do_not_mix():
    latents, timesteps, embeddings = states(6)
    value = network()
    together = value(latents, timesteps, embeddings)
    alone = [value(latents[i : i + 1], timesteps[i : i + 1], embeddings[i : i + 1]) for i in range(6)]
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-5, atol=1e-6)


def test_it_learns_from_all_three():
    """A target that needs x_t, t and c: most of its variance is explained on states that were not trained on."""

    def target(latents, timesteps, embeddings):
        return latents.mean((1, 2, 3)) * 8 + 3 * timesteps / STEPS + embeddings.mean((1, 2)) * 5

    value = network(width=32)
    optimizer = torch.optim.AdamW(value.parameters(), lr=3e-3)
    for seed in range(150):
        given = states(128, shape=(4, 4, 4), seed=seed)
        loss = (value(*given) - target(*given)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    given = states(512, shape=(4, 4, 4), seed=1000)
    wanted = target(*given)
    with torch.no_grad():
        error = (value(*given) - wanted).square().mean()
    for part in (given[0].mean((1, 2, 3)) * 8, 3 * given[1] / STEPS, given[2].mean((1, 2)) * 5):
        assert part.var() > 0.5  # no part is small enough to be left out
    assert error < 0.1 * wanted.var()


def test_values_of_a_policys_states(make_env, make_policy):
    env = make_env(3)
    policy, (observation, _) = make_policy(env), env.reset(seed=0)
    values = (value := ValueNetwork.of(policy)).values(policy, observation)
    latents, timesteps, tokens = (observation[name] for name in ("latents", "timestep", "prompt"))
    torch.testing.assert_close(values, value(latents, timesteps[:, 0], policy.embed(tokens)))
    numbers = {name: part.numpy() for name, part in observation.items()}
    torch.testing.assert_close(value.values(policy, numbers), values)
