"""Pixel DDPMs against diffusers' own schedulers and pipelines."""

import diffusers
import gymnasium as gym
import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file

from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.agents.rollout import denoise
from diffusion_gym.config import SamplerConfig
from diffusion_gym.models import load_model
from diffusion_gym.models.lora import merged, with_lora
from diffusion_gym.scheduling import step_gaussian
from diffusion_gym.testing.conformance import check_vector_env
from diffusion_gym.testing.random_ddpm import write_random_ddpm

KINDS = [(pipeline, flat) for pipeline in ("DDPMPipeline", "DDIMPipeline") for flat in (False, True)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The tiny model by (pipeline class, whether its files lie at the top); the weights are the same."""
    root = tmp_path_factory.mktemp("ddpm")
    return {kind: write_random_ddpm(root / "-".join(map(str, kind)), pipeline=kind[0], flat=kind[1]) for kind in KINDS}


@pytest.fixture(scope="module")
def folder(folders):
    return str(folders["DDPMPipeline", False])


@pytest.fixture
def model(folder):
    return load_model(folder, "cpu", "float32")


def pictures(seed, number=2):
    return torch.randn(number, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def output(unet, pixels, times=(400, 700)):
    with torch.no_grad():
        return unet(pixels, torch.tensor(times)).sample


def pretrained(folder):
    """Plain diffusers' network, laid out as ours is on a CPU; another layout rounds otherwise."""
    return UNet2DModel.from_pretrained(folder, subfolder="unet").to(memory_format=torch.channels_last)


def plain(kind, folder):
    pipe = getattr(diffusers, kind).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_loads_in_either_layout(kind, folders, folder):
    model = load_model(str(folders[kind]), "cpu", "float32")
    assert torch.equal(output(model.unet, pictures(0)), output(pretrained(folder), pictures(0)))
    assert model.scheduler_config["_class_name"] == kind[0].replace("Pipeline", "Scheduler")
    assert model.scheduler_config["clip_sample"] is True
    assert (model.latent_shape, model.image_shape, model.num_train_timesteps) == ((3, 8, 8), (8, 8, 3), 1000)
    assert (model.prompt_length, model.vocab_size, model.default_prompts) == (0, 0, "unconditional")


def test_weights_under_the_names_of_2022_load(folders, folder, tmp_path):
    """Google's files name the attention projections as diffusers did then."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    write_random_ddpm(tmp_path, seed=9, flat=True)
    weights = load_file(folders["DDPMPipeline", True] / "diffusion_pytorch_model.safetensors")
    renamed = {}
    for name, tensor in weights.items():
        for now, then in old.items():
            name = name.replace(f".{now}.", f".{then}.")
        renamed[name] = tensor
    assert sum("query" in name for name in renamed) >= 2
    save_file(renamed, tmp_path / "diffusion_pytorch_model.safetensors")
    model = load_model(str(tmp_path), "cpu", "float32")
    assert torch.equal(output(model.unet, pictures(0)), output(pretrained(folder), pictures(0)))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("clip", [True, False])
def test_steps_agree_with_the_schedulers(sampler, clip, variance, tmp_path):
    folder = write_random_ddpm(tmp_path, clip_sample=clip, variance_type=variance)
    model = load_model(str(folder), "cpu", "float32")
    table = model.step_table(SamplerConfig(num_inference_steps=40, sampler=sampler))
    kind = diffusers.DDPMScheduler if sampler == "ddpm" else diffusers.DDIMScheduler
    scheduler = kind.from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(40)
    assert table.timesteps.tolist() == scheduler.timesteps.tolist()
    x, predicted = 1.5 * pictures(1), pictures(2)
    clamped = 0
    for step, t in enumerate(scheduler.timesteps):
        mean, std = step_gaussian(table, torch.tensor([step] * 2), x.double(), predicted.double())
        options = {"eta": 1.0} if sampler == "ddim" else {}
        generator = torch.Generator().manual_seed(step)
        taken = scheduler.step(predicted, t, x, generator=generator, **options)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(step))
        torch.testing.assert_close((mean + std * noise).float(), taken.prev_sample, rtol=1e-5, atol=1e-5)
        clamped += int((taken.pred_original_sample.abs() == 1).sum())
    assert (clamped > 0) == clip


def sampled(model, config):
    """Two pictures by the policy, all noise of one generator."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(2, *model.latent_shape, generator=generator)
    return model.decode(denoise(DenoisingPolicy(model, config), noise, None, generator))


def test_deterministic_sampling_equals_ddims_pipeline(folders):
    folder = folders["DDIMPipeline", False]
    config = SamplerConfig(num_inference_steps=5, eta=0.0)
    model = load_model(str(folder), "cpu", "float32")
    ours = sampled(model, config)
    generator = torch.Generator().manual_seed(3)
    theirs = plain("DDIMPipeline", folder)(2, generator, num_inference_steps=5, output_type="np").images
    np.testing.assert_allclose(ours.permute(0, 2, 3, 1).numpy(), theirs, atol=1e-5)
    assert theirs.std() > 1e-2


def test_ancestral_sampling_equals_ddpms_pipeline(model, folder):
    config = SamplerConfig(num_inference_steps=5, sampler="ddpm")
    ours = sampled(model, config)
    generator = torch.Generator().manual_seed(3)
    theirs = plain("DDPMPipeline", folder)(2, generator, num_inference_steps=5, output_type="np").images
    np.testing.assert_allclose(ours.permute(0, 2, 3, 1).numpy(), theirs, atol=1e-5)


def test_decode_maps_pixels_to_the_unit_interval(model):
    pixels = torch.tensor([-3.0, -1.0, 0.0, 0.5, 1.0, 1.2]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    decoded = model.decode(pixels.to(torch.bfloat16))
    assert decoded.dtype == torch.float32
    np.testing.assert_allclose(decoded[0, 0, 0].numpy(), [0, 0, 0.5, 0.75, 1, 1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_predicts_nearly_the_same(model, folder, dtype):
    half = load_model(folder, "cpu", dtype)
    times = torch.tensor([400, 700])
    with torch.no_grad():
        predicted = half.predict(half.unet, pictures(0), times, None)
    assert predicted.dtype == getattr(torch, dtype)
    assert predicted.isfinite().all()
    torch.testing.assert_close(predicted.float(), output(model.unet, pictures(0)), rtol=0.05, atol=0.05)


def test_environment_shows_no_prompt_and_takes_the_sampler_of_the_thesis(folder):
    env = gym.make_vec("DiffusionDenoise-v0", num_envs=2, model=folder, reward="Compressibility")
    observation, info = env.reset(seed=0)
    assert set(env.single_observation_space) == set(observation) == {"timestep", "latents"}
    assert info["prompt"].tolist() == ["", ""]
    config = env.unwrapped.sampler_config
    assert (config.sampler, config.num_inference_steps, config.eta, config.guidance_scale) == ("ddim", 40, 1.0, 1.0)
    assert observation["timestep"].flatten().tolist() == [975, 975]


def test_environment_conforms(folder):
    keywords = {"model": folder, "num_inference_steps": 2, "reward": "Compressibility"}
    check_vector_env(lambda **more: gym.make_vec("DiffusionDenoise-v0", **keywords, **more))


@pytest.mark.parametrize(
    ("trainable", "dtype"), [("lora", "float32"), ("full", "float32"), ("lora", "bfloat16"), ("lora", "float16")]
)
def test_policy_begins_at_the_pretrained_model_and_learns(folder, trainable, dtype):
    keywords = {"model": folder, "reward": "Compressibility", "num_inference_steps": 4, "dtype": dtype}
    env = gym.make_vec("DiffusionDenoise-v0", num_envs=2, **keywords)
    policy = DenoisingPolicy.from_env(env, trainable=trainable)
    policy.set_training(gradient_checkpointing=True)
    observation, _ = env.reset(seed=0)
    action = policy.distribution(observation).sample(torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(policy.distribution(observation).mean, policy.reference_distribution(observation).mean)
    policy(observation, action).sum().backward()
    learning = {name: p for name, p in policy.trainable_parameters().items() if p.grad is not None and p.grad.any()}
    assert len(learning) >= 8  # of LoRA the second factors: four projections in each attention
    assert trainable == "full" or all("lora_B" in name for name in learning)


def test_merged_adapters_predict_what_they_did_apart(model):
    torch.manual_seed(0)
    tuned = with_lora(model.unet, 4)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    whole = merged(tuned)
    assert set(whole.state_dict()) == set(model.unet.state_dict())
    before = output(model.unet, pictures(0))
    torch.testing.assert_close(output(whole, pictures(0)), output(tuned, pictures(0)))
    assert (output(whole, pictures(0)) - before).abs().max() > 1e-2
    assert any("lora" in name for name, _ in tuned.named_parameters())


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_saved_pipeline_runs_in_plain_diffusers(kind, folders, tmp_path):
    model = load_model(str(folders[kind]), "cpu", "float32")
    tuned = with_changes(model.unet)
    model.save_pipeline(str(tmp_path / "out"), tuned)
    pipe = plain(kind[0], tmp_path / "out")
    assert type(pipe.scheduler).__name__ == kind[0].replace("Pipeline", "Scheduler")
    assert torch.equal(output(pipe.unet, pictures(0)), output(tuned, pictures(0)))
    images = pipe(2, torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 8, 8, 3) and np.isfinite(images).all()


def with_changes(unet):
    tuned = UNet2DModel.from_config(unet.config)
    tuned.load_state_dict({name: 1.1 * tensor for name, tensor in unet.state_dict().items()})
    return tuned.eval()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_class_embeds": 3}, "is conditioned on classes; use an unconditional UNet2DModel"),
        ({"out_channels": 6}, "has 3 channels in and 6 out"),
        ({"in_channels": 1, "out_channels": 1}, "has 1 channels in and 1 out"),
    ],
)
def test_other_networks_are_refused(options, message, folder, tmp_path):
    config = {**UNet2DModel.load_config(folder, subfolder="unet"), **options}
    pipe = plain("DDPMPipeline", folder)
    diffusers.DDPMPipeline(unet=UNet2DModel.from_config(config), scheduler=pipe.scheduler).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"model='{tmp_path}' {message}"):
        load_model(str(tmp_path), "cpu", "float32")
