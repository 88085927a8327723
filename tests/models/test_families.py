"""Every family of flow-matching transformers, on tiny random pipelines of the published classes.

A family's line says how it is written, and which keywords of the pipeline's own call its guidance is. Everything else is
asked of all alike: the pipeline's own pictures at eta 0, a ratio of 1, a training step, adapters that diffusers reads.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import diffusers
import gymnasium as gym
import pytest
import torch
from agent_updates import transitions, update, weights

from diffusion_gym import SamplerConfig
from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.agents.algorithms import DDPOIS
from diffusion_gym.agents.rollout import collect, denoise
from diffusion_gym.models import load_model
from diffusion_gym.testing.random_flux import write_random_flux
from diffusion_gym.testing.random_qwen import write_random_flux2_klein, write_random_qwen_image, write_random_z_image
from diffusion_gym.testing.random_sana import write_random_sana
from diffusion_gym.testing.random_xl_sd3 import write_random_sd3

PROMPTS = ["a red circle", "two blue stars above a small green square", ""]
STEPS = 3


@dataclass(frozen=True)
class Family:
    """A family under test.

    Attributes:
        write: writes the tiny pipeline to a folder.
        size: height and width of its pictures, in pixels, and another pair.
        guidance: the scales to try; more than 1 where the family can.
        call: the pipeline's keywords for a guidance scale.
    """

    write: Callable[..., Any]
    guidance: tuple[float, ...]
    call: Callable[[float], dict[str, Any]]
    size: tuple[tuple[int, int], tuple[int, int]] = ((8, 8), (8, 16))
    options: dict[str, Any] = field(default_factory=dict)


def true_cfg(scale: float) -> dict[str, Any]:
    return {"true_cfg_scale": scale, "negative_prompt": [""] * len(PROMPTS)}


FAMILIES = {
    "flux-dev": Family(write_random_flux, (1.0, 3.5), lambda scale: {"guidance_scale": scale}),
    "flux-schnell": Family(write_random_flux, (1.0,), lambda scale: {}, options={"guidance_embeds": False}),
    "qwen-image": Family(write_random_qwen_image, (1.0, 4.0), true_cfg),
    "z-image": Family(write_random_z_image, (1.0, 4.0), lambda scale: {"guidance_scale": scale - 1}),
    "flux2-klein": Family(write_random_flux2_klein, (1.0, 4.0), lambda scale: {"guidance_scale": scale}),
    "sana": Family(
        write_random_sana,
        (1.0, 4.5),
        lambda scale: {"guidance_scale": scale, "use_resolution_binning": False},
        ((32, 32), (32, 64)),  # the pipeline's own check, whatever the autoencoder
    ),
    "sd3": Family(write_random_sd3, (1.0, 4.5), lambda scale: {"guidance_scale": scale}),
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """`folder_of(name)`: the tiny pipeline of a family, written once."""

    @cache
    def write(name):
        family = FAMILIES[name]
        return family.write(tmp_path_factory.mktemp("families") / name, **family.options)

    return write


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture
def family(name):
    return FAMILIES[name]


@pytest.fixture
def folder(name, folder_of):
    return folder_of(name)


def load(folder, family, which=0):
    height, width = family.size[which]
    return load_model(str(folder), "cpu", "float32").with_options(height=height, width=width)


def own_pipeline(folder):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if (shift := pipe.scheduler.config.get("flow_shift")) is not None:  # a multistep solver, which gives way to Euler
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    return pipe


def start(model):
    return torch.randn(len(PROMPTS), *model.latent_shape, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def ours(model, guidance):
    """Pictures by the means of the policy's Gaussians."""
    policy = DenoisingPolicy(model, SamplerConfig(num_inference_steps=STEPS, guidance_scale=guidance, eta=0.0))
    return model.decode(denoise(policy, start(model), model.tokenize(PROMPTS)))


def theirs(pipe, model, family, guidance, **options):
    height, width, _ = model.image_shape
    packed = model._packed(start(model)) if model.patch > 1 and hasattr(pipe, "_pack_latents") else start(model)
    return pipe(
        prompt=list(PROMPTS),
        latents=packed,
        height=height,
        width=width,
        num_inference_steps=STEPS,
        output_type="pt",
        **{**family.call(guidance), **options},
    ).images


@pytest.mark.parametrize("which", [0, 1], ids=["square", "oblong"])
def test_a_rollout_without_noise_is_the_pipeline_s_own(folder, family, which):
    model, pipe = load(folder, family, which), own_pipeline(folder)
    seen = []
    for guidance in family.guidance:
        pictures, expected = ours(model, guidance), theirs(pipe, model, family, guidance)
        torch.testing.assert_close(pictures, expected, rtol=0, atol=1e-5)
        assert pictures.shape[2:] == family.size[which] and expected.std() > 1e-2
        assert (pictures[0] - pictures[1]).abs().max() > 1e-3
        seen.append(pictures)
    assert all((one - seen[0]).abs().max() > 1e-4 for one in seen[1:])


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3))


@pytest.fixture
def env(folder, family):
    return gym.make_vec(
        "DiffusionDenoise-v0",
        num_envs=4,
        model=load(folder, family),
        reward=brightness,
        prompts=PROMPTS,
        num_inference_steps=STEPS,
        guidance_scale=family.guidance[-1],
    )


def test_an_iteration_of_training_begins_at_a_ratio_of_1(env, perturb):
    policy = perturb(DenoisingPolicy.from_env(env, lora_rank=2), 0.1)
    rolled = collect(env, policy, torch.Generator().manual_seed(0), seed=0)
    with torch.no_grad():
        ratios = (policy(*transitions(rolled)) - rolled.log_probs.T.flatten()).exp()
    assert (ratios - 1).abs().max() <= 1e-5 and rolled.rewards.std() > 0
    agent = DDPOIS(policy, DDPOIS.Config(learning_rate=1e-3, normalization="batch", lora_rank=2))
    before = weights(agent)
    metrics = update(agent, rolled)
    assert all(torch.isfinite(torch.tensor(value)) for value in metrics.values() if isinstance(value, float))
    assert all(parameter.grad.any() for parameter in agent.parameters)  # of every adapter
    assert (weights(agent) - before).abs().max() > 1e-4


def test_adapters_load_in_plain_diffusers(folder, family, perturb, tmp_path):
    model = load(folder, family)
    policy = perturb(DenoisingPolicy(model, SamplerConfig(num_inference_steps=STEPS), lora_rank=2), 0.1)
    model.save_lora(tmp_path, policy.unet)
    pipe = own_pipeline(folder)
    pipe.load_lora_weights(str(tmp_path))

    @torch.no_grad()
    def output(network):
        times = torch.tensor([900.0, 500.5, 10.0])
        return model.predict(network, start(model), times, model.embed(model.tokenize(PROMPTS)))

    torch.testing.assert_close(output(getattr(pipe, model.NETWORK)), output(policy.unet), rtol=0, atol=1e-5)
    assert (output(policy.unet) - output(model.unet)).abs().max() > 1e-2


def test_guidance_of_a_distilled_model_is_refused(folder_of):
    with pytest.raises(ValueError, match="guidance_scale=3.0 is nothing to model=.*distilled.*leave it at 1"):
        gym.make_vec("DiffusionDenoise-v0", num_envs=1, model=str(folder_of("flux-schnell")), guidance_scale=3.0)


@pytest.mark.parametrize("size", [{"height": 9}, {"width": 0}, {"height": 8.0}, {"width": -8}, {"height": True}])
def test_a_size_that_the_model_cannot_make_is_refused(folder_of, size):
    model = load_model(str(folder_of("flux-dev")), "cpu", "float32")
    [(name, value)] = size.items()
    with pytest.raises(ValueError, match=f"{name}={value!r} is no size of model=.*use a multiple of 4 pixels, such as"):
        model.with_options(**size)
