"""Stable Diffusion 3 against diffusers' own pipeline, with and without its third text encoder."""

import shutil

import gymnasium as gym
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

import diffusion_gym
from diffusion_gym import SamplerConfig
from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.agents.rollout import denoise
from diffusion_gym.models import load_model
from diffusion_gym.models.embeddings import unpack_pooled
from diffusion_gym.models.sd3 import SD3Model
from diffusion_gym.testing.random_xl_sd3 import write_random_sd3

gym.register_envs(diffusion_gym)
PROMPTS = ["a red circle", "two blue stars", "a star above a triangle"]
STEPS = 6


@pytest.fixture(scope="module", params=[True, False], ids=["t5", "no-t5"])
def folder(request, tmp_path_factory):
    return write_random_sd3(tmp_path_factory.mktemp("models") / "sd3", t5=request.param)


@pytest.fixture(scope="module")
def model(folder):
    return load_model(str(folder), "cpu", "float32")


def load_pipeline(folder):
    absent = {} if (folder / "text_encoder_3").is_dir() else {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(folder):
    return load_pipeline(folder)


def start():
    return torch.randn(3, 16, 4, 4, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def finished(model, guidance):
    """x_0 by the means of the policy's Gaussians."""
    config = SamplerConfig(num_inference_steps=STEPS, guidance_scale=guidance, eta=0.0)
    return denoise(DenoisingPolicy(model, config), start(), model.tokenize(PROMPTS))


def sampled(pipe, guidance, output_type="latent"):
    options = {"latents": start(), "num_inference_steps": STEPS, "guidance_scale": guidance}
    return pipe(PROMPTS, output_type=output_type, **options).images


def test_a_directory_is_loaded_by_its_class(model, folder):
    assert isinstance(model, SD3Model)
    assert (model.latent_shape, model.image_shape) == ((16, 4, 4), (8, 8, 3))
    assert not any(parameter.requires_grad for parameter in model.unet.parameters())
    length = 16 + 16 + 256 * (folder / "text_encoder_3").is_dir()
    assert model.tokenize(PROMPTS).shape == (3, model.prompt_length) == (3, length)


@torch.no_grad()
def test_embeddings_are_those_of_the_pipeline(model, pipe):
    hidden, empty, pooled, empty_pooled = pipe.encode_prompt(PROMPTS, PROMPTS, PROMPTS)
    found = unpack_pooled(model.embed(model.tokenize([*PROMPTS, ""])), pooled.shape[1])
    without = pipe.text_encoder_3 is None
    states = torch.cat([found[0], found[0][:, -1:].expand(-1, 255, -1)], dim=1) if without else found[0]
    torch.testing.assert_close(states, torch.cat([hidden, empty[:1]]), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found[1], torch.cat([pooled, empty_pooled[:1]]), rtol=1e-5, atol=1e-5)
    assert (hidden[0] - hidden[1]).abs().max() > 0.1
    assert bool((hidden[:, -256:] == 0).all()) is without


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_a_deterministic_sampling_is_that_of_the_pipeline(model, pipe, guidance):
    expected = sampled(pipe, guidance)
    torch.testing.assert_close(finished(model, guidance), expected, rtol=0, atol=1e-4)
    assert expected.std() > 0.5


def test_the_network_is_given_the_exact_timesteps(model, pipe):
    seen, policy = [], DenoisingPolicy(model, SamplerConfig(num_inference_steps=STEPS, guidance_scale=1.0))
    policy.unet.register_forward_pre_hook(
        lambda module, inputs, options: seen.append(options["timestep"]), with_kwargs=True
    )
    for step in range(STEPS):
        policy.distribution(policy.observation(start(), step, model.tokenize(PROMPTS)))
    pipe.scheduler.set_timesteps(STEPS)
    assert torch.equal(torch.stack(seen), pipe.scheduler.timesteps[:, None].expand(-1, 3))
    assert (pipe.scheduler.timesteps % 1 != 0).any()


def test_the_defaults_are_those_of_flow_grpo_and_can_be_changed(model, folder):
    env = gym.make_vec("DiffusionDenoise-v0", num_envs=1, model=str(folder))
    config = env.unwrapped.sampler_config
    assert (config.num_inference_steps, config.guidance_scale, config.eta) == (10, 4.5, 0.7)
    env = gym.make_vec("DiffusionDenoise-v0", num_envs=1, model=str(folder), eta=0.3)
    assert (env.unwrapped.sampler_config.eta, env.unwrapped.sampler_config.guidance_scale) == (0.3, 4.5)
    own = SD3Model(folder, device=model.device, dtype=model.dtype, sampler_defaults={"eta": 0.5})
    assert own.sampler_defaults == {"num_inference_steps": 10, "guidance_scale": 4.5, "eta": 0.5}


def test_an_ancestral_sampler_is_refused(folder):
    with pytest.raises(ValueError, match="sampler='ddpm' is no sampler of a flow-matching model; use one of"):
        gym.make_vec("DiffusionDenoise-v0", num_envs=1, model=str(folder), sampler="ddpm")


@pytest.mark.parametrize("part", ["transformer", "text_encoder_2", "text_encoder_3"])
def test_a_directory_that_lacks_a_part_is_refused(folder, tmp_path, part):
    """Without T5 only if the pipeline was saved so."""
    if not (folder / part).is_dir():
        pytest.skip("saved without")
    copied = shutil.copytree(folder, tmp_path / "sd3")
    shutil.rmtree(copied / part)
    with pytest.raises(FileNotFoundError, match=part):
        load_model(str(copied), "cpu", "float32")


# --- what is saved ---------------------------------------------------------------------------------------------


@pytest.fixture
def trained(model, perturb):
    """A policy with weights away from the pretrained model's."""

    def move(trainable):
        config = SamplerConfig(num_inference_steps=STEPS)
        return perturb(DenoisingPolicy(model, config, trainable=trainable, lora_rank=2), 0.1)

    return move


@torch.no_grad()
def output(model, network):
    return model.predict(network, start(), torch.tensor([900.0, 500.5, 1.0]), model.embed(model.tokenize(PROMPTS)))


def test_a_saved_pipeline_loads_in_diffusers(model, trained, tmp_path):
    policy = trained("full")
    model.save_pipeline(str(tmp_path), policy.unet)
    pipe = load_pipeline(tmp_path)
    torch.testing.assert_close(output(model, pipe.transformer), output(model, policy.unet))
    assert (output(model, pipe.transformer) - output(model, model.unet)).abs().max() > 1e-2
    assert sampled(pipe, 4.5, "np").shape == (3, 8, 8, 3)
