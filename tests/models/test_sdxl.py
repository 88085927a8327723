"""SDXL against diffusers' own pipeline: embeddings, sizes, types, what is saved; test_families.py has its sampling."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline

from diffusion_gym import SamplerConfig
from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.models import load_model
from diffusion_gym.models.embeddings import pack_pooled, unpack_pooled
from diffusion_gym.models.sdxl import SDXLModel
from diffusion_gym.testing.random_xl_sd3 import write_random_sdxl

PROMPTS = ["a red circle", "two blue stars", "a star above a triangle"]
STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_random_sdxl(tmp_path_factory.mktemp("models") / "sdxl")


@pytest.fixture(scope="module")
def model(folder):
    return load_model(str(folder), "cpu", "float32")


def load_pipeline(folder, **options):
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False, **options)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(folder):
    return load_pipeline(folder)


def start():
    return torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(5))


def sampled(pipe, guidance, output_type="latent"):
    options = {"latents": start(), "num_inference_steps": STEPS, "guidance_scale": guidance, "eta": 0.0}
    return pipe(PROMPTS, output_type=output_type, **options).images


@pytest.mark.parametrize("pooled", [7, 8, 9, 20])
def test_what_is_packed_comes_out_again(pooled):
    generator = torch.Generator().manual_seed(0)
    hidden, vector = torch.randn(3, 5, 8, generator=generator), torch.randn(3, pooled, generator=generator)
    packed = pack_pooled(hidden, vector)
    assert packed.shape == (3, 5 + {7: 1, 8: 1, 9: 2, 20: 3}[pooled], 8)
    found = unpack_pooled(packed, pooled)
    assert torch.equal(found[0], hidden) and torch.equal(found[1], vector)


def test_a_directory_is_loaded_by_its_class(model, folder):
    assert isinstance(model, SDXLModel)
    assert (model.latent_shape, model.image_shape) == ((4, 4, 4), (8, 8, 3))
    assert not any(parameter.requires_grad for parameter in model.unet.parameters())
    tokens = model.tokenize(PROMPTS)
    assert tokens.dtype == torch.int64 and tokens.shape == (3, model.prompt_length) == (3, 32)


@torch.no_grad()
def test_embeddings_are_those_of_the_pipeline(model, pipe):
    hidden, _, pooled, _ = pipe.encode_prompt(PROMPTS)
    found = unpack_pooled(model.embed(model.tokenize(PROMPTS)), pooled.shape[1])
    torch.testing.assert_close(found, (hidden, pooled), rtol=1e-5, atol=1e-5)
    assert (hidden[0] - hidden[1]).abs().max() > 0.1


@pytest.mark.parametrize("zeros", [True, False])
@torch.no_grad()
def test_the_empty_prompt_is_that_of_the_pipeline(tmp_path, zeros):
    """What guidance pushes away from is; a prompt that is empty stays what the encoders make of it."""
    folder = write_random_sdxl(tmp_path, force_zeros_for_empty_prompt=zeros)
    model, pipe = load_model(str(folder), "cpu", "float32"), load_pipeline(folder)
    hidden, empty, pooled, empty_pooled = pipe.encode_prompt(PROMPTS[:1])
    assert bool((empty == 0).all()) is zeros
    found = unpack_pooled(torch.cat([model.embed(model.tokenize(PROMPTS[:1])), model.embed_null()]), pooled.shape[1])
    torch.testing.assert_close(found[0], torch.cat([hidden, empty]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], torch.cat([pooled, empty_pooled]), rtol=1e-5, atol=1e-5)
    hidden, _, pooled, _ = pipe.encode_prompt([""])
    found = unpack_pooled(model.embed(model.tokenize([""])), pooled.shape[1])
    torch.testing.assert_close(found, (hidden, pooled), rtol=1e-5, atol=1e-5)


def test_the_size_of_the_picture_is_a_condition(model):
    """The original and the target size, 8 x 8, and a crop at the origin."""
    seen = []
    hook = model.unet.register_forward_pre_hook(
        lambda module, inputs, options: seen.append(options["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    try:
        model.predict(model.unet, start(), torch.tensor([1, 2, 3]), model.embed(model.tokenize(PROMPTS)))
    finally:
        hook.remove()
    assert seen[0].tolist() == [[8, 8, 0, 0, 8, 8]] * 3


@pytest.mark.parametrize("upcast", [True, False])
def test_the_autoencoder_decodes_in_float32_where_float16_overflows(folder, tmp_path, upcast):
    copied = shutil.copytree(folder, tmp_path / "sdxl")
    vae = AutoencoderKL.from_pretrained(copied, subfolder="vae")
    vae.register_to_config(force_upcast=upcast)
    vae.save_pretrained(copied / "vae")
    model = load_model(str(copied), "cpu", "float16")
    assert model.unet.dtype == model.text_encoder_2.dtype == torch.float16
    assert model.vae.dtype == (torch.float32 if upcast else torch.float16)
    pictures = model.decode(start())
    assert pictures.dtype == torch.float32
    if upcast:
        expected = vae.half().float().decode(start() / vae.config.scaling_factor).sample
        torch.testing.assert_close(pictures, (expected / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("said, bound", [({}, None), ({"clip_sample": False}, None), ({"clip_sample": True}, 1.0)])
def test_a_scheduler_that_says_nothing_of_clamping_does_not_clamp(folder, tmp_path, said, bound):
    """Euler's scheduler has no `clip_sample`; DDIM's default would clamp x0 to [-1, 1]."""
    copied = shutil.copytree(folder, tmp_path / "sdxl")
    path = copied / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    del config["clip_sample"]
    path.write_text(json.dumps({**config, **said}))
    model = load_model(str(copied), "cpu", "float32")
    assert model.step_table(SamplerConfig()).clip_x0 == bound


def test_a_variant_is_loaded(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, variant="fp16")
    model = load_model(str(tmp_path), "cpu", "float32", {"variant": "fp16"})
    for name, parameter in pipe.unet.named_parameters():
        assert torch.equal(parameter, model.unet.get_parameter(name))
    with pytest.raises((FileNotFoundError, OSError)):
        load_model(str(tmp_path), "cpu", "float32")


@pytest.mark.parametrize("part", ["unet", "text_encoder_2", "tokenizer_2"])
def test_a_directory_that_lacks_a_part_is_refused(folder, tmp_path, part):
    copied = shutil.copytree(folder, tmp_path / "sdxl")
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
    return model.predict(network, start(), torch.tensor([900, 500, 1]), model.embed(model.tokenize(PROMPTS)))


def test_a_saved_pipeline_loads_in_diffusers(model, trained, tmp_path):
    policy = trained("full")
    model.save_pipeline(str(tmp_path), policy.unet)
    pipe = load_pipeline(tmp_path)
    torch.testing.assert_close(output(model, pipe.unet), output(model, policy.unet))
    assert (output(model, pipe.unet) - output(model, model.unet)).abs().max() > 1e-2
    assert pipe.config.force_zeros_for_empty_prompt
    assert sampled(pipe, 5.0, "np").shape == (3, 8, 8, 3)
