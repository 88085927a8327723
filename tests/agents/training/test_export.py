"""What a run saves must work in plain diffusers."""

import gymnasium as gym
import pytest
import torch

from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.agents.training.export import export_policy


@pytest.fixture
def env(make_env):
    return make_env(2, prompts=["a red circle"])


def states(policy):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 4, 4, generator=generator)
    return latents, torch.tensor([400, 700]), torch.randn(2, 16, 16, generator=generator)


def load_pipeline(path):
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(path, safety_checker=None, torch_dtype=torch.float32)


@torch.no_grad()
def output(unet, inputs):
    latents, times, embeddings = inputs
    return unet(latents, times, encoder_hidden_states=embeddings).sample


def test_lora_weights_load_in_diffusers(env, perturb, tiny_pipeline, tmp_path):
    policy = DenoisingPolicy.from_env(env, trainable="lora", lora_rank=2)
    perturb(policy, 0.3)
    export_policy(policy, tmp_path / "model")
    pipe = load_pipeline(tiny_pipeline)
    inputs = states(policy)
    before = output(pipe.unet, inputs)
    pipe.load_lora_weights(str(tmp_path / "model"))
    after = output(pipe.unet, inputs)
    torch.testing.assert_close(after, output(policy.unet, inputs))
    assert (after - before).abs().max() > 1e-2


def test_a_full_pipeline_loads_in_diffusers(env, perturb, tmp_path):
    policy = DenoisingPolicy.from_env(env, trainable="full")
    perturb(policy, 0.3)
    export_policy(policy, tmp_path / "model")
    pipe = load_pipeline(tmp_path / "model")
    inputs = states(policy)
    torch.testing.assert_close(output(pipe.unet, inputs), output(policy.unet, inputs))
    assert len(pipe(["a red circle"], num_inference_steps=2, output_type="np").images) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_line_that_loads_a_pipeline_says_its_dtype_in_half_precision(dtype, tmp_path):
    import diffusers

    from diffusion_gym.testing.random_ddpm import write_random_ddpm

    env = gym.make_vec("DiffusionDenoise-v0", num_envs=1, model=str(write_random_ddpm(tmp_path / "base")), dtype=dtype)
    line = export_policy(DenoisingPolicy.from_env(env, trainable="lora"), tmp_path / "model")
    assert line.startswith("DDPMPipeline.from_pretrained(") and ("torch_dtype" in line) == (dtype != "float32")
    pipe = eval(f"diffusers.{line}", {"diffusers": diffusers, "torch": torch})
    assert pipe.unet.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("t5", [False, True], ids=["without-t5", "t5"])
def test_the_line_that_loads_a_pipeline_names_the_parts_that_it_goes_without(t5, trainable, perturb, tmp_path):
    import diffusers

    from diffusion_gym.testing.random_xl_sd3 import write_random_sd3

    base = str(write_random_sd3(tmp_path / "base", t5=t5))
    policy = DenoisingPolicy.from_env(gym.make_vec("DiffusionDenoise-v0", num_envs=1, model=base), trainable=trainable)
    perturb(policy, 0.3)
    line = export_policy(policy, tmp_path / "model")
    assert ("text_encoder_3=None, tokenizer_3=None" in line) is not t5
    scope = {"StableDiffusion3Pipeline": diffusers.StableDiffusion3Pipeline}
    exec(line if trainable == "lora" else f"pipe = {line}", scope)
    pipe = scope["pipe"]
    assert (pipe.text_encoder_3 is not None) is t5
    for name, weight in policy.unet.state_dict().items():
        if "lora_" in name or trainable == "full":
            name = name.replace(".default.", ".default_0.") if trainable == "lora" else name
            assert torch.equal(pipe.transformer.state_dict()[name], weight), name
