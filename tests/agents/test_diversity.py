"""Vendi score and pairwise distance, by hand, by their definitions, and on pictures that are all the same."""

import math

import numpy as np
import pytest
import torch

from diffusion_gym import SamplerConfig
from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.agents.benchmark.measures import Evaluator
from diffusion_gym.agents.diversity import (
    by_prompt,
    centred,
    model_features,
    pairwise_distance,
    vendi_score,
)
from diffusion_gym.agents.rollout import Trajectories
from diffusion_gym.agents.training.changes import diversity
from diffusion_gym.models import load_model
from diffusion_gym.testing.random_ddpm import write_random_ddpm
from diffusion_gym.testing.random_flux import write_random_flux
from diffusion_gym.testing.random_pipeline import write_random_pipeline
from diffusion_gym.testing.random_qwen import write_random_flux2_klein, write_random_qwen_image, write_random_z_image
from diffusion_gym.testing.random_sana import write_random_sana
from diffusion_gym.testing.random_xl_sd3 import write_random_sd3, write_random_sdxl


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def pictures(finished):
    """Trajectories of which only the end is known, of one prompt."""
    number, none = len(finished), torch.zeros(0)
    return Trajectories(("",) * number, None, none, finished[None], none, torch.zeros(number), {}, none)


def draw(number, dimensions, seed=0):
    return np.random.default_rng(seed).normal(size=(number, dimensions))


def test_vendi_score_by_hand():
    assert vendi_score(np.tile([[3.0, 4.0]], (7, 1))) == pytest.approx(1)  # identical
    assert vendi_score(np.diag([1.0, 2.0, 3.0, 4.0, 5.0])) == pytest.approx(5)  # orthogonal, whatever their length
    groups = np.array([[1.0, 0, 0]] * 4 + [[0, 0, 2.0]] * 4)
    assert vendi_score(groups) == pytest.approx(2)  # two groups of the same size
    uneven = np.array([[1.0, 0]] * 3 + [[0, 1.0]])
    assert vendi_score(uneven) == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))


@pytest.mark.parametrize(("number", "dimensions"), [(6, 20), (20, 6)])
def test_vendi_score_is_that_of_its_definition(number, dimensions):
    """exp of the entropy of the eigenvalues of the N x N similarity matrix over N (arXiv:2210.02410)."""
    features = draw(number, dimensions)
    kernel = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in features] for a in features])
    eigenvalues = np.linalg.eigvals(kernel / number).real
    eigenvalues = eigenvalues[eigenvalues > 1e-10]
    assert vendi_score(features) == pytest.approx(np.exp(-np.sum(eigenvalues * np.log(eigenvalues))))


def test_pairwise_distance_by_brute_force():
    features = draw(9, 4)
    distances = [
        1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        for i, a in enumerate(features)
        for j, b in enumerate(features)
        if i != j
    ]
    assert pairwise_distance(features) == pytest.approx(np.mean(distances))
    assert math.isnan(pairwise_distance(features[:1]))


def test_within_a_prompt():
    features = draw(7, 5)
    prompts = ["a", "b", "a", "c", "b", "a", "b"]  # one c alone says nothing
    groups = [features[[0, 2, 5]], features[[1, 4, 6]]]
    found = by_prompt(features, prompts)
    assert found["vendi"] == pytest.approx(np.mean([vendi_score(group) for group in groups]))
    assert found["distance"] == pytest.approx(np.mean([pairwise_distance(group) for group in groups]))
    assert all(math.isnan(value) for value in by_prompt(features[:2], ["a", "b"]).values())


def test_what_all_pictures_share_hides_no_difference():
    features = draw(8, 5) + 100.0
    assert vendi_score(features) < 1.1
    np.testing.assert_allclose(centred(features, features).mean(0), 0, atol=1e-12)
    assert vendi_score(centred(features, features)) > 2
    collapsed = np.tile(features[:1], (8, 1))
    assert vendi_score(centred(collapsed, features)) == pytest.approx(1)


def test_features_are_the_pretrained_networks_middle_block(make_policy, make_env):
    """Against a direct call of the network; tuning the policy does not change them."""
    env = make_env(2)
    policy = make_policy(env, scale=0.5)
    finished = torch.randn(5, *policy.model.latent_shape, generator=torch.Generator().manual_seed(1))
    network = policy.model.unet
    null = policy.model.embed(policy.model.tokenize([""])).expand(5, -1, -1)
    seen = []
    handle = network.mid_block.register_forward_hook(lambda module, arguments, output: seen.append(output))
    with torch.no_grad():
        network(finished, policy.table.timesteps[-1], encoder_hidden_states=null)
    handle.remove()
    found = model_features(policy, finished, batch=2)
    np.testing.assert_allclose(found, seen[0].mean((2, 3)).numpy(), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(found, model_features(make_policy(env, scale=0.0), finished, batch=2))


def test_a_network_without_a_middle_block_is_refused(make_policy, make_env, monkeypatch):
    policy = make_policy(make_env(2))
    monkeypatch.setattr(policy.model, "unet", torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Linear has no middle block to take features from"):
        model_features(policy, torch.zeros(1, *policy.model.latent_shape))


@pytest.mark.parametrize(
    "write",
    [
        write_random_pipeline,
        write_random_sdxl,
        write_random_sd3,
        write_random_flux,
        write_random_flux2_klein,
        write_random_qwen_image,
        write_random_z_image,
        write_random_sana,
        write_random_ddpm,
    ],
)
def test_evaluations_and_benchmarks_measure_the_diversity_of_every_family(tmp_path, write):
    """Of UNets and of transformers, whose pictures and prompts are two sequences or one."""
    size = {"height": 8, "width": 8} if write is write_random_z_image else {}  # its own is for large pictures' schedule
    model = load_model(str(write(tmp_path / "model")), "cpu", "float32", size)
    policy = DenoisingPolicy(model, SamplerConfig(num_inference_steps=2))
    base, tuned = (pictures(torch.randn(4, *model.latent_shape, generator=seeded(seed))) for seed in (1, 2))
    found = diversity(policy, tuned, base)
    assert found.keys() == {"vendi", "base_vendi"} and all(1 < value <= 4 for value in found.values())
    evaluator = Evaluator(None, None, 4, seed=7)
    evaluator._base = model_features(policy, base.finished)  # of a rollout, which needs no environment here
    features = evaluator._features(policy, tuned)
    assert by_prompt(features, tuned.prompts)["vendi"] == pytest.approx(found["vendi"])
