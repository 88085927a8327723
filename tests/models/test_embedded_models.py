"""The embedded models, as they ship."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline

from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.config import SamplerConfig
from diffusion_gym.models import load_model, shapes, shapes_flow
from diffusion_gym.rewards import evaluate, make_reward
from diffusion_gym.shapes.captions import FAMILIES, all_captions
from diffusion_gym.shapes.scenes import render
from tools.shapes.autoencoder import reconstruct
from tools.shapes.measure import sample_images

SHIPPED = {"Shapes": shapes, "ShapesFlow": shapes_flow}
PIPELINES = {"Shapes": StableDiffusionPipeline, "ShapesFlow": StableDiffusion3Pipeline}


@pytest.fixture(scope="module", params=SHIPPED)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    return load_model(name, "cpu", "float32")


def test_plain_diffusers_loads_and_samples_it(name):
    pipe = PIPELINES[name].from_pretrained(SHIPPED[name].WEIGHTS)
    pipe.set_progress_bar_config(disable=True)
    pictures = pipe(["a red circle"] * 8, num_inference_steps=10, guidance_scale=2.0, output_type="np").images
    assert pictures.shape == (8, 32, 32, 3)
    assert pictures.std() > 0.05


def test_the_shipped_files_are_small_and_complete(name):
    files = [path for path in SHIPPED[name].WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10e6
    names = {path.name for path in files}
    assert {"vocab.json", "merges.txt", "tokenizer.json", "README.md", "model_index.json"} <= names
    assert not any(path.suffix in (".bin", ".pt", ".pkl", ".pth") for path in files)
    index = json.loads((SHIPPED[name].WEIGHTS / "model_index.json").read_text())
    assert index["_class_name"] == PIPELINES[name].__name__


def test_every_word_is_one_token(model):
    for family in FAMILIES:
        for caption in all_captions(family)[::97]:
            tokens = model.tokenizer(str(caption)).input_ids
            assert len(tokens) == len(str(caption).split()) + 2


def test_reconstructions_keep_what_the_detector_sees(model):
    rng = np.random.default_rng(123)
    reward = make_reward("Composition", strict=True)
    for family in FAMILIES:
        captions = all_captions(family)
        chosen = [captions[i] for i in rng.integers(len(captions), size=200)]
        pictures = np.stack([render(caption, rng) for caption in chosen])
        decoded = reconstruct(model.vae, pictures, torch.device("cpu"))
        assert evaluate(reward, decoded, [str(c) for c in chosen]).scores.mean() >= 0.97, family


@pytest.mark.parametrize(
    ("family", "low", "high"),
    [("color", 0.85, 1.0), ("count", 0.4, 0.9), ("composition", 0.45, 0.95), ("location", 0.2, 0.75)],
)
def test_success_leaves_signal_and_room(name, model, family, low, high):
    captions = [str(caption) for caption in all_captions(family)]
    rng = np.random.default_rng(11)
    prompts = [captions[i] for i in rng.integers(len(captions), size=64)]
    policy = DenoisingPolicy(model, SamplerConfig(**SHIPPED[name].SAMPLER_DEFAULTS))
    images = sample_images(policy, prompts, torch.Generator().manual_seed(3))
    success = float(evaluate(make_reward("Composition", strict=True), images, prompts).scores.mean())
    assert low <= success <= high
