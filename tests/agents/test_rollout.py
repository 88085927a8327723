"""Rollouts: what is stored is what happened, and the same seed makes it happen again."""

from dataclasses import fields

import gymnasium as gym
import numpy as np
import pytest
import torch

from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.agents.embeddings import TextEmbeddings
from diffusion_gym.agents.rollout import Trajectories, collect_many, trained_steps
from diffusion_gym.images import to_uint8
from diffusion_gym.rewards import RewardOutput


def identical(first, second):
    """Whether two rollouts are equal bit for bit."""
    for field in fields(Trajectories):
        a, b = getattr(first, field.name), getattr(second, field.name)
        if isinstance(a, TextEmbeddings):
            a, b = a.all(), b.all()
        if isinstance(a, torch.Tensor):
            if not torch.equal(a, b):
                return False
        elif isinstance(a, dict):
            if a.keys() != b.keys() or not all(torch.equal(a[key], b[key]) for key in a):
                return False
        elif a != b:
            return False
    return True


def with_components(images, prompts, metadata):
    red, green, _ = images.mean((2, 3)).unbind(1)
    return RewardOutput(red + 2 * green, {"red": red, "green": green})


# --- what is stored --------------------------------------------------------------------------------------------


def test_shapes_and_types(make_env, make_policy, roll):
    env = make_env(5, num_inference_steps=3, reward=with_components)
    rolled = roll(env, make_policy(env))
    assert len(rolled) == len(rolled.prompts) == 5
    assert set(rolled.prompts) <= {"a red circle", "two blue stars", "a green square"}
    expected = {
        "tokens": ((5, 16), torch.int64),
        "timesteps": ((3,), torch.int64),
        "latents": ((4, 5, 4, 4, 4), torch.float32),
        "log_probs": ((3, 5), torch.float32),
        "rewards": ((5,), torch.float32),
        "images": ((5, 8, 8, 3), torch.uint8),
    }
    for name, (shape, dtype) in expected.items():
        value = getattr(rolled, name)
        assert (tuple(value.shape), value.dtype) == (shape, dtype), name
        assert not value.requires_grad
    assert {name: tuple(value.shape) for name, value in rolled.components.items()} == {"red": (5,), "green": (5,)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_latents_are_stored_in_float32_unrounded(make_env, make_policy, roll, dtype):
    env = make_env(dtype=dtype)
    rolled = roll(env, make_policy(env))
    assert rolled.latents.dtype == torch.float32
    for latents in rolled.latents:
        assert not torch.equal(latents, latents.bfloat16().float())


@pytest.mark.parametrize("mode", ["SameStep", "NextStep", "Disabled"])
def test_a_rollout_is_what_a_user_gets_from_the_environment(make_env, make_policy, roll, mode):
    """The loop of a user, step by step, with the same noise."""
    env = make_env(3, reward=with_components, autoreset_mode="Disabled")
    policy = make_policy(env)
    rolled = roll(make_env(3, reward=with_components, autoreset_mode=mode), policy, seed=4)
    generator = torch.Generator().manual_seed(4)
    observation, infos = env.reset(seed=4)
    assert tuple(infos["prompt"]) == rolled.prompts
    assert torch.equal(observation["prompt"], rolled.tokens)
    for step in range(4):
        assert torch.equal(observation["latents"], rolled.latents[step])
        assert observation["timestep"].flatten().tolist() == [rolled.timesteps[step]] * 3
        with torch.no_grad():
            distribution = policy.distribution(observation)
        action = distribution.sample(generator)
        assert torch.equal(action, rolled.latents[step + 1])
        assert torch.equal(distribution.log_prob(action), rolled.log_probs[step])
        observation, rewards, ended, _, infos = env.step(action)
    assert ended.all() and torch.equal(rewards, rolled.rewards)
    images = policy.model.decode(rolled.latents[-1])
    assert torch.equal(rolled.images, to_uint8(images))
    red, green = images[:, 0].mean((1, 2)), images[:, 1].mean((1, 2))
    torch.testing.assert_close(rolled.rewards, red + 2 * green, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rolled.components["green"], green, rtol=1e-5, atol=1e-6)


def test_states_and_actions_of_pairs(make_env, make_policy, roll):
    env = make_env(4)
    rolled = roll(env, make_policy(env))
    samples, steps = torch.tensor([2, 0, 2]), torch.tensor([3, 1, 0])
    states, actions = rolled.states(samples, steps), rolled.actions(samples, steps)
    for row, (sample, step) in enumerate(zip(samples.tolist(), steps.tolist(), strict=True)):
        assert torch.equal(states["latents"][row], rolled.latents[step, sample])
        assert torch.equal(actions[row], rolled.latents[step + 1, sample])
        assert states["timestep"][row].tolist() == [[751, 501, 251, 1][step]]
        assert torch.equal(states["prompt"][row], rolled.tokens[sample])


def test_a_numpy_environment_gives_the_same_rollout(make_env, make_policy, roll):
    env = make_env(3, reward=with_components)
    policy = make_policy(env)
    assert identical(roll(make_env(3, reward=with_components, output="numpy"), policy), roll(env, policy))


def test_options_reach_the_environment(make_env, make_policy, roll):
    env = make_env(3)
    start = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(9))
    prompts = ["a green square", "a red circle", "a green square"]
    rolled = roll(env, make_policy(env), options={"latents": start, "prompt": prompts})
    assert torch.equal(rolled.latents[0], start)
    assert rolled.prompts == tuple(prompts)


def test_failed_rewards_pass_through(make_env, make_policy, roll):
    def failing(images, prompts, metadata):
        return torch.tensor([1.0, float("nan"), float("inf")])

    env = make_env(3, reward=failing)
    assert str(roll(env, make_policy(env)).rewards.tolist()) == "[1.0, nan, inf]"


def test_the_reference_can_act(make_env, make_policy, roll):
    env = make_env(3)
    tuned, untouched = make_policy(env), DenoisingPolicy.from_env(env, trainable="full")
    base = roll(env, tuned, reference=True)
    assert identical(base, roll(env, untouched))
    assert not torch.equal(base.latents, roll(env, tuned).latents)


def test_one_step_is_a_rollout_too(make_env, make_policy, roll):
    env = make_env(3, num_inference_steps=1, sigma_min=0.1)
    rolled = roll(env, make_policy(env))
    assert rolled.latents.shape == (2, 3, 4, 4, 4) and rolled.rewards.isfinite().all()


# --- determinism -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_the_same_seed_gives_the_same_rollout(make_env, make_policy, roll, trainable):
    rolls = []
    for seed in (3, 3, 4):
        env = make_env(4)
        rolls.append(roll(env, make_policy(env, trainable), seed=seed))
    assert identical(rolls[0], rolls[1])
    assert not torch.equal(rolls[0].latents[0], rolls[2].latents[0])


def test_the_global_generators_play_no_part(make_env, make_policy, roll):
    env = make_env(4)
    policy = make_policy(env)
    rolls = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        rolls.append(roll(env, policy, seed=3))
    assert identical(*rolls)


def test_n_environments_equal_n_single_ones(make_env, make_policy, tiny_pipeline):
    """Env i of seed s is the single env of seed s + i, over two episodes without a new seed between."""
    number, seed = 4, 11
    keywords = {
        "model": str(tiny_pipeline),
        "reward": with_components,
        "prompts": ["a red circle", "two blue stars", "a green square"],
        "num_inference_steps": 4,
    }
    env = make_env(number, reward=with_components, autoreset_mode="Disabled")
    policy = make_policy(env)
    singles = [gym.make("DiffusionDenoise-v0", **keywords) for _ in range(number)]
    for episode in range(2):
        episode_seed = seed if episode == 0 else None
        observation, infos = env.reset(seed=episode_seed)
        starts = [s.reset(seed=None if episode_seed is None else seed + i) for i, s in enumerate(singles)]
        for index, (single_observation, single_info) in enumerate(starts):
            assert single_info["prompt"] == infos["prompt"][index]
            for key, value in single_observation.items():
                assert np.array_equal(value, observation[key][index].numpy())
        generator = torch.Generator().manual_seed(episode)
        for _ in range(4):
            action = policy.distribution(observation).sample(generator)
            observation, rewards, ended, _, infos = env.step(action)
            for index, single in enumerate(singles):
                alone, reward, over, _, info = single.step(action[index].numpy())
                assert all(np.array_equal(value, observation[key][index].numpy()) for key, value in alone.items())
                assert reward == pytest.approx(rewards[index].item(), abs=1e-6) and over == bool(ended[index])
        assert over
        assert np.abs(info["image"].astype(int) - infos["image"][-1].numpy().astype(int)).max() <= 1
        green = infos["reward_components"]["green"][-1].item()
        assert info["reward_components"]["green"] == pytest.approx(green, abs=1e-6)


def test_a_trajectory_does_not_depend_on_its_batch(make_env, make_policy, roll):
    """The policy's Gaussian for sample i is that of the sample alone, up to the rounding of the kernels."""
    env = make_env(4)
    policy = make_policy(env)
    rolled = roll(env, policy)
    for sample in range(4):
        at = torch.full((4,), sample)
        alone = [policy.distribution(rolled.states(at[:1], torch.tensor([step]))) for step in range(4)]
        for step, distribution in enumerate(alone):
            torch.testing.assert_close(
                distribution.log_prob(rolled.actions(at[:1], torch.tensor([step]))).detach(),
                rolled.log_probs[step, sample : sample + 1],
                rtol=0,
                atol=1e-5,
            )


# --- many ------------------------------------------------------------------------------------------------------


def test_the_latents_of_all_batches_are_stored_once(make_env, make_policy, monkeypatch):
    env = make_env(3)
    policy, joined, cat = make_policy(env), [], torch.cat

    def recorded(tensors, *axis, **keywords):
        joined.append(list(tensors))
        return cat(joined[-1], *axis, **keywords)

    monkeypatch.setattr(torch, "cat", recorded)
    many = collect_many(env, policy, 9, (0, 1))
    sizes = {tuple(tensor.shape) for tensors in joined for tensor in tensors}
    assert (3, 8, 8, 3) in sizes  # the pictures of each batch
    assert not sizes & {tuple(many.latents[:, :3].shape), tuple(many.log_probs[:, :3].shape)}
    assert many.latents.untyped_storage().nbytes() == many.latents.numel() * 4 and many.latents.is_contiguous()


def test_many_are_joined_in_order(make_env, make_policy):
    env = make_env(3, reward=with_components)
    policy = make_policy(env)
    many, first = collect_many(env, policy, 9, (0, 1)), collect_many(env, policy, 3, (0, 1))
    assert len(many) == len(many.prompts) == 9
    shapes = {name: tuple(getattr(many, name).shape) for name in ("tokens", "timesteps", "latents", "log_probs")}
    assert shapes == {"tokens": (9, 16), "timesteps": (4,), "latents": (5, 9, 4, 4, 4), "log_probs": (4, 9)}
    assert many.rewards.shape == many.components["red"].shape == (9,) and many.images.shape == (9, 8, 8, 3)
    start = Trajectories(
        many.prompts[:3],
        many.tokens[:3],
        many.timesteps,
        many.latents[:, :3],
        many.log_probs[:, :3],
        many.rewards[:3],
        {key: value[:3] for key, value in many.components.items()},
        many.images[:3],
        many.embeddings.part(range(3)),
    )
    assert identical(start, first)
    assert torch.equal(many.embeddings.all(), policy.embed(many.tokens))
    batches = many.latents[0].view(3, 3, -1)
    assert not torch.equal(batches[0], batches[1]) and not torch.equal(batches[1], batches[2])
    for sample in range(9):  # the parts of a sample stay together
        assert torch.equal(many.tokens[sample], policy.model.tokenize([many.prompts[sample]])[0])
    assert torch.equal(many.images, to_uint8(torch.cat([policy.model.decode(x) for x in many.latents[-1].split(3)])))


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_batch_of_pictures_that_are_not_finite_is_nan_among_the_others(
    make_env, make_policy, monkeypatch, lost, background
):
    class Reward:
        def __call__(self, *batch):
            return with_components(*batch)

    Reward.background = background
    env = make_env(3, reward=Reward(), autoreset_mode="Disabled")
    decode, calls = env.unwrapped.model.decode, []

    def overflowing(latents):
        calls.append(len(latents))
        return decode(latents) * (torch.nan if len(calls) == lost + 1 else 1.0)

    monkeypatch.setattr(env.unwrapped.model, "decode", overflowing)
    with pytest.warns(UserWarning, match="3 of 3 pictures hold NaN"):
        many = collect_many(env, make_policy(env), 6, (0, 1))
    mine = torch.arange(6) // 3 == lost
    for values in (many.rewards, many.components["red"]):
        assert torch.equal(values.isnan(), mine)


@pytest.mark.parametrize("mode", ["SameStep", "NextStep", "Disabled"])
def test_many_do_not_depend_on_what_happened_before(make_env, make_policy, roll, mode):
    env = make_env(3, autoreset_mode=mode)
    policy = make_policy(env)
    fresh = collect_many(env, policy, 6, (0, 0, 7))
    roll(env, policy, seed=1)
    observation, _ = env.reset(seed=5)
    env.step(policy.distribution(observation).sample())
    collect_many(env, policy, 3, (0, 0, 6))
    assert identical(collect_many(env, policy, 6, (0, 0, 7)), fresh)


@pytest.mark.parametrize("other", [(0, 0, 8), (1, 0, 7), (0, 2, 7), (0, 0)])
def test_each_seed_path_has_its_own_randomness(make_env, make_policy, other):
    env = make_env(3)
    policy = make_policy(env)
    first, second = collect_many(env, policy, 3, (0, 0, 7)), collect_many(env, policy, 3, other)
    assert not (first.latents[0] == second.latents[0]).any()
    noise = [(rolled.latents[1] - rolled.latents[0]).flatten() for rolled in (first, second)]
    assert not torch.equal(*noise)


def test_a_number_that_is_no_multiple_is_refused(make_env, make_policy):
    env = make_env(4)
    with pytest.raises(ValueError, match="number=6 must be a multiple of num_envs=4"):
        collect_many(env, make_policy(env), 6, (0,))


# --- the steps that train ------------------------------------------------------------------------------------------


class Table:
    """T = 6 steps, of which step 3 is deterministic."""

    sigma = torch.tensor([1.0, 1, 1, 0, 1, 1])

    def __len__(self):
        return 6


@pytest.mark.parametrize(
    "part, steps", [((0, 1), [0, 1, 2, 4, 5]), ((0.0, 0.5), [0, 1, 2]), ((0.5, 1.0), [4, 5]), ((0.34, 0.7), [4])]
)
def test_trained_steps_are_the_stochastic_ones_of_a_part(part, steps):
    assert trained_steps(Table(), part).tolist() == steps
    assert trained_steps(Table(), part, deterministic=True).tolist() == sorted({*steps, 3} if part[1] > 0.5 else steps)


@pytest.mark.parametrize("part", [(0.5, 0.5), (0.6, 0.2), (-0.1, 1.0), (0.0, 1.1), (0.5, 0.6)])
def test_parts_without_a_stochastic_step_are_refused(part):
    with pytest.raises(ValueError, match=r"trained_steps=.* must be two fractions of T=6.* with a stochastic step"):
        trained_steps(Table(), part)
