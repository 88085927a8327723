"""The policy keeps text embeddings on the host, as many as fit."""

import pytest
import torch

from diffusion_gym.agents import policy as policy_module


@pytest.fixture
def counted(make_env, make_policy, monkeypatch):
    """A policy with room for two prompts, and the prompts that its text encoder was given."""
    policy = make_policy(make_env())
    original, seen = policy.model.embed, []
    one = original(policy.model.tokenize([""]))
    monkeypatch.setattr(policy_module, "_EMBEDDING_CACHE_BYTES", 2 * one.nbytes + 1)
    monkeypatch.setattr(policy.model, "embed", lambda tokens: seen.append(len(tokens)) or original(tokens))
    return policy, original, seen


def test_the_prompts_used_last_stay_and_the_others_are_encoded_again(counted):
    policy, original, seen = counted
    a, b, c = policy.model.tokenize(["a red circle", "two blue stars", "a green square"])
    for rows, encoded in (([a, b], 2), ([a], 0), ([c], 1), ([a], 0), ([b, c, b], 1), ([a], 1)):
        seen.clear()
        found = policy.embed(torch.stack(rows))
        assert seen == [1] * encoded
        torch.testing.assert_close(found, original(torch.stack(rows)))
        assert len(policy._embeddings) <= 2


def test_a_batch_of_more_prompts_than_fit_is_right(counted):
    policy, original, _ = counted
    rows = policy.model.tokenize(["a red circle", "two blue stars", "a green square", "a red circle"])
    torch.testing.assert_close(policy.embed(rows), original(rows))
    assert len(policy._embeddings) == 2
    # None shares the memory of those that have left.
    assert all(kept.untyped_storage().nbytes() == kept.nbytes for kept in policy._embeddings.values())


@pytest.mark.gpu
def test_embeddings_and_pictures_of_a_gpu_are_on_the_host(make_env):
    from diffusion_gym.agents import DenoisingPolicy
    from diffusion_gym.agents.rollout import collect_many

    env = make_env(2, device="cuda", autoreset_mode="Disabled")
    policy = DenoisingPolicy.from_env(env)
    rolled = collect_many(env, policy, 4, (0, 0))
    assert {kept.device.type for kept in policy._embeddings.values()} == {"cpu"} == {rolled.images.device.type}
    assert policy.embed(rolled.tokens).device.type == rolled.latents.device.type == "cuda"
