"""What is measured at an evaluation point, against the evaluation of runs and against loops written out."""

import math

import numpy as np
import pytest
import torch

from diffusion_gym.agents.algorithms import NoUsableReward
from diffusion_gym.agents.benchmark.measures import Evaluator, Work
from diffusion_gym.agents.diversity import by_prompt, centred, model_features
from diffusion_gym.agents.rollout import collect_many
from diffusion_gym.agents.training import evaluation, sampling
from diffusion_gym.prompts import PromptSet
from diffusion_gym.rewards import RewardOutput

SEED = 7
PROMPTS = PromptSet("three", ("a red circle", "two blue stars"), ("a green square",))


def contrast(images, prompts, metadata):
    return RewardOutput(images.std((1, 2, 3)), {"dark": 1 - images.mean((1, 2, 3))})


@pytest.fixture
def envs(make_env):
    """The environment and that of the held-out prompts; four at once."""
    keywords = {"autoreset_mode": "Disabled", "reward": contrast}
    return make_env(4, prompts=PROMPTS, **keywords), make_env(4, prompts=PROMPTS.held_out_set(), **keywords)


def test_the_measures(envs, make_policy, monkeypatch):
    env, held_out = envs
    policy = make_policy(env)

    def probe(images, prompts, metadata):
        return images[:, 0].mean((1, 2))

    found = Evaluator(env, held_out, 8, SEED, probe).measure(policy)
    monkeypatch.setattr(evaluation, "EVALUATION", sampling.BENCHMARK)  # the noise of the benchmark, not of `eval`
    expected = evaluation.compare(env, policy, 8, SEED, kl_samples=8)
    unseen = evaluation.compare(held_out, policy, 8, SEED)
    assert found.values["reward"] == pytest.approx(expected.summary()["reward_mean"], rel=1e-6)
    assert found.values["kl"] == pytest.approx(expected.summary()["kl_to_base"], rel=1e-6)
    assert found.values["held_out_reward"] == pytest.approx(unseen.summary()["reward_mean"], rel=1e-6)
    assert found.values["dark"] == pytest.approx(1 - expected.tuned.images.numpy().mean() / 255, abs=2e-3)
    assert found.values["probe"] == pytest.approx(expected.tuned.images[..., 0].numpy().mean() / 255, rel=1e-5)
    features = model_features(policy, expected.tuned.finished)
    alike = centred(features, model_features(policy, expected.base.finished))
    for name, value in by_prompt(alike, found.prompts).items():
        assert found.values[name] == pytest.approx(value)
    assert torch.equal(found.samples["images"], expected.tuned.images)
    assert torch.equal(found.samples["rewards"], expected.tuned.rewards)
    assert found.prompts == expected.tuned.prompts and found.values["kl"] > 0


def test_the_pretrained_model_is_at_no_distance(envs, make_policy, monkeypatch):
    env, held_out = envs
    policy = make_policy(env, scale=0.0)
    found = Evaluator(env, held_out, 4, SEED).measure(policy)
    monkeypatch.setattr(evaluation, "EVALUATION", sampling.BENCHMARK)
    base = evaluation.compare(env, policy, 4, SEED)
    assert found.values["kl"] == 0 and "probe" not in found.values
    assert found.values["reward"] == pytest.approx(base.summary()["base_reward_mean"], rel=1e-6)


def test_agents_of_the_same_seed_are_measured_on_the_same_noise(envs, make_policy):
    """Another policy, and one that trains other weights, begins from the same latents and prompts."""
    env, _ = envs
    first, second = (collect_many(env, make_policy(env, trainable=kind), 8, (SEED, 3)) for kind in ("lora", "full"))
    assert torch.equal(first.latents[0], second.latents[0]) and first.prompts == second.prompts
    found = [Evaluator(env, None, 8, seed).measure(make_policy(env, scale=0.0)) for seed in (SEED, SEED, SEED + 1)]
    assert torch.equal(found[0].samples["images"], found[1].samples["images"])
    assert not torch.equal(found[0].samples["images"], found[2].samples["images"])


def test_the_denoised_path_is_that_of_a_loop(envs, make_policy):
    """x0~ of each step by the formula (x_t - noise eps) / signal from the policy's own prediction."""
    env, _ = envs
    policy = make_policy(env)
    samples = Evaluator(env, None, 4, SEED).measure(policy).samples
    rolled = collect_many(env, policy, 4, (SEED, 3))
    model, table = policy.model, policy.table
    assert samples["path_images"].shape[:2] == (len(table) + 1, 4)
    for step in range(len(table)):
        states = rolled.states(torch.arange(4), torch.full((4,), step))
        with torch.no_grad():
            noise = policy.predicted_noise(states)
            x0 = (rolled.latents[step] - table.noise[step] * noise) / table.signal[step]
            images = model.decode(x0)
        np.testing.assert_allclose(samples["path_images"][step] / 255, images.permute(0, 2, 3, 1), atol=0.51 / 255)
        np.testing.assert_allclose(samples["path_rewards"][step], images.std((1, 2, 3)), rtol=1e-4)
    assert torch.equal(samples["path_images"][-1], rolled.images)


def test_large_pictures_are_stored_smaller(envs, make_policy, monkeypatch):
    env, _ = envs
    monkeypatch.setattr("diffusion_gym.agents.benchmark.measures._SHOWN_SIDE", 4)
    found = Evaluator(env, None, 4, SEED).measure(make_policy(env))
    whole = collect_many(env, make_policy(env), 4, (SEED, 3)).images.float()
    blocks = whole.reshape(4, 4, 2, 4, 2, 3).mean((2, 4))  # 8 x 8 pictures, as means of 2 x 2
    assert (found.samples["images"].float() - blocks).abs().max() <= 1


def test_failed_rewards(make_env, make_policy):
    """Those of some pictures are left out of the mean; those of all are an error, not a number."""
    nan = float("nan")

    def some(images, prompts, metadata):
        scores = torch.arange(len(prompts), dtype=torch.float32)
        return RewardOutput(torch.where(scores < 3, scores, nan), {"never": torch.full_like(scores, nan)})

    env = make_env(4, prompts=PROMPTS, reward=some, autoreset_mode="Disabled")
    found = Evaluator(env, None, 4, SEED).measure(make_policy(env))
    assert found.values["reward"] == 1.0 and math.isnan(found.values["never"])
    env.unwrapped.reward = lambda images, prompts, metadata: torch.full((len(prompts),), nan)
    with pytest.raises(NoUsableReward, match="all 4 rewards of the measurement are NaN"):
        Evaluator(env, None, 4, SEED).measure(make_policy(env))


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_work_counts_samples_through_the_network(envs, make_policy, trainable):
    """Guidance takes both branches; the pretrained network counts too; nothing counts outside."""
    env, _ = envs
    policy = make_policy(env, trainable=trainable)
    work, steps = Work(policy), len(policy.table)
    branches = 1 if policy.config.guidance_scale == 1 else 2
    with work.counting():
        rolled = collect_many(env, policy, 4, (0, 0))
    assert work.evaluations == 4 * steps * branches and work.seconds > 0
    collect_many(env, policy, 4, (0, 0))
    with work.counting():
        policy.reference_distribution(rolled.states(torch.arange(3), torch.zeros(3, dtype=torch.int64)))
    assert work.evaluations == (4 * steps + 3) * branches
