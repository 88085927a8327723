"""The policy keeps text embeddings on the host, as many as fit."""

import pytest
import torch

from diffusion_gym.agents import embeddings as embeddings_module
from diffusion_gym.agents.embeddings import TextEmbeddings


@pytest.fixture
def counted(make_env, make_policy, monkeypatch):
    """A policy with room for two prompts, and the prompts that its text encoder was given."""
    policy = make_policy(make_env())
    original, seen = policy.model.embed, []
    one = original(policy.model.tokenize([""]))
    monkeypatch.setattr(embeddings_module, "CACHE_BYTES", 2 * one.nbytes + 1)
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
        assert len(policy.embeddings.rows) <= 2


def test_a_batch_of_more_prompts_than_fit_is_right(counted):
    policy, original, _ = counted
    rows = policy.model.tokenize(["a red circle", "two blue stars", "a green square", "a red circle"])
    torch.testing.assert_close(policy.embed(rows), original(rows))
    assert len(policy.embeddings.rows) == 2
    # None shares the memory of those that have left.
    assert all(kept.untyped_storage().nbytes() == kept.nbytes for kept in policy.embeddings.rows.values())


@pytest.mark.gpu
def test_embeddings_and_pictures_of_a_gpu_are_on_the_host(make_env):
    from diffusion_gym.agents import DenoisingPolicy
    from diffusion_gym.agents.rollout import collect_many

    env = make_env(2, device="cuda", autoreset_mode="Disabled")
    policy = DenoisingPolicy.from_env(env)
    rolled = collect_many(env, policy, 4, (0, 0))
    assert {kept.device.type for kept in policy.embeddings.rows.values()} == {"cpu"} == {rolled.images.device.type}
    assert policy.embed(rolled.tokens).device.type == rolled.latents.device.type == "cuda"


# --- of a rollout ----------------------------------------------------------------------------------------------


@pytest.fixture
def moved(monkeypatch):
    """Bytes of each tensor that goes to the device as text embeddings."""
    bytes_, move = [], embeddings_module.to_device

    def recorded(values, *where):
        bytes_.append(values.nbytes)
        return move(values, *where)

    monkeypatch.setattr(embeddings_module, "to_device", recorded)
    return bytes_


def found_of(policy, prompts):
    return policy.embeddings.find(policy.model.tokenize(prompts))


def test_equal_prompts_of_a_rollout_are_stored_once_and_go_to_the_device_once(make_env, make_policy, moved):
    policy = make_policy(make_env())
    a, b = ["a red circle"] * 3 + ["two blue stars"], ["two blue stars"] * 2
    joined = TextEmbeddings.join([found_of(policy, a), found_of(policy, b)])
    samples, row = torch.tensor([5, 0, 3]), policy.embed(policy.model.tokenize(["x"])).nbytes
    moved.clear()
    for _ in range(2):
        assert torch.equal(joined[samples], policy.embed(policy.model.tokenize([b[1], a[0], a[3]])))
    assert moved[:2] == [2 * row, 6 * 8]  # the distinct rows, and which one each of the six samples has
    assert len(joined) == 6 and torch.equal(joined.all(), policy.embed(policy.model.tokenize(a + b)))


def test_a_rollout_of_many_prompts_keeps_them_on_the_host_and_moves_what_is_used(
    make_env, make_policy, moved, monkeypatch
):
    policy = make_policy(make_env())
    prompts = [
        f"{number} {shape}" for number in ("a", "two", "three", "four") for shape in ("circle", "star", "square")
    ]
    found, row = found_of(policy, prompts), policy.embed(policy.model.tokenize(["x"])).nbytes
    distinct = len({tuple(tokens.tolist()) for tokens in policy.model.tokenize(prompts)})
    monkeypatch.setattr(embeddings_module, "DEVICE_BYTES", distinct * row - 1)
    for samples in ([3, 3, 11], [0], list(range(5, 10))):
        expected = policy.embed(policy.model.tokenize([prompts[sample] for sample in samples]))
        moved.clear()
        assert torch.equal(found[torch.tensor(samples)], expected)
        assert moved == [len(samples) * row]


def test_the_cache_and_the_rollouts_share_the_rows(make_env, make_policy):
    policy = make_policy(make_env())
    first, again = found_of(policy, ["a red circle", "a red circle"]), found_of(policy, ["a red circle"])
    rows = {id(row) for found in (first, again) for row in found._rows.values()}
    assert rows == {id(row) for row in policy.embeddings.rows.values()}
