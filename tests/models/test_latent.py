"""Our rollout against diffusers' own pipeline: the same noise must give the same pictures."""

import gymnasium as gym
import numpy as np
import pytest
import torch

import diffusion_gym
from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.agents.rollout import collect
from diffusion_gym.models import load_model

gym.register_envs(diffusion_gym)
PROMPTS = ["a red circle", "two blue stars", "a star above a triangle"]


def mean_brightness(images, prompts, metadata):
    return images.mean((1, 2, 3))


def pipeline_pictures(path, start, guidance, eta, steps, seed):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(path, safety_checker=None, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        PROMPTS,
        latents=start,
        guidance_scale=guidance,
        eta=eta,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_rollout_equals_the_pipeline_of_diffusers(tiny_pipeline, guidance, eta):
    env = gym.make_vec(
        "DiffusionDenoise-v0",
        num_envs=len(PROMPTS),
        model=str(tiny_pipeline),
        reward=mean_brightness,
        prompts=PROMPTS,
        num_inference_steps=6,
        guidance_scale=guidance,
        eta=eta,
        autoreset_mode="Disabled",
    )
    policy = DenoisingPolicy.from_env(env)
    start = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    rolled = collect(
        env, policy, torch.Generator().manual_seed(7), seed=0, options={"prompt": PROMPTS, "latents": start}
    )
    expected = pipeline_pictures(tiny_pipeline, start, guidance, eta, 6, 7)
    difference = np.abs(rolled.images.numpy() / 255 - expected)
    assert difference.max() <= 0.5 / 255 + 1e-4  # ours are rounded to uint8
    assert expected.std() > 1e-3


def test_the_model_is_loaded_once_and_frozen(tiny_pipeline):
    model = load_model(str(tiny_pipeline), "cpu", "float32")
    assert load_model(str(tiny_pipeline), "cpu", "float32") is model
    assert not any(parameter.requires_grad for parameter in model.unet.parameters())


def test_decode_does_not_depend_on_its_batches(tiny_pipeline, monkeypatch):
    model = load_model(str(tiny_pipeline), "cpu", "float32")
    latents = torch.randn(5, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    whole = model.decode(latents)
    monkeypatch.setattr("diffusion_gym.models.latent._PIXELS_A_DECODE", 2 * 8 * 8)
    torch.testing.assert_close(model.decode(latents), whole)
    assert whole.shape == (5, 3, 8, 8) and 0 <= whole.min() and whole.max() <= 1


def test_an_unknown_model_name_gets_a_suggestion():
    with pytest.raises(ValueError, match="model='Shape' is unknown; did you mean 'Shapes'"):
        load_model("Shape", "cpu", "float32")


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="dtype='float8' must be one of float32"):
        load_model("Shapes", "cpu", "float8")
