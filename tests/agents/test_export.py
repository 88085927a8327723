"""What a run saves must work in plain diffusers."""

import gymnasium as gym
import pytest
import torch

import diffusion_gym
from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.agents.export import export_policy

gym.register_envs(diffusion_gym)


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3))


@pytest.fixture
def env(tiny_pipeline):
    return gym.make_vec(
        "DiffusionDenoise-v0", num_envs=2, model=str(tiny_pipeline), reward=brightness, prompts=["a red circle"]
    )


def change(policy):
    """Move the trainable weights away from the pretrained model."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def states(policy):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 4, 4, generator=generator)
    return latents, torch.tensor([400, 700]), torch.randn(2, 16, 16, generator=generator)


def load_pipeline(path):
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(path, safety_checker=None, dtype=torch.float32)


@torch.no_grad()
def output(unet, inputs):
    latents, times, embeddings = inputs
    return unet(latents, times, encoder_hidden_states=embeddings).sample


def test_lora_weights_load_in_diffusers(env, tiny_pipeline, tmp_path):
    policy = DenoisingPolicy.from_env(env, trainable="lora", lora_rank=2)
    change(policy)
    export_policy(policy, tmp_path / "model")
    pipe = load_pipeline(tiny_pipeline)
    inputs = states(policy)
    before = output(pipe.unet, inputs)
    pipe.load_lora_weights(str(tmp_path / "model"))
    after = output(pipe.unet, inputs)
    torch.testing.assert_close(after, output(policy.unet, inputs))
    assert (after - before).abs().max() > 1e-2


def test_a_full_pipeline_loads_in_diffusers(env, tmp_path):
    policy = DenoisingPolicy.from_env(env, trainable="full")
    change(policy)
    export_policy(policy, tmp_path / "model")
    pipe = load_pipeline(tmp_path / "model")
    inputs = states(policy)
    torch.testing.assert_close(output(pipe.unet, inputs), output(policy.unet, inputs))
    assert len(pipe(["a red circle"], num_inference_steps=2, output_type="np").images) == 1
