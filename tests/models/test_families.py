"""Every family of latent models, on tiny random pipelines of the published classes.

A family's line says how it is written, and which keywords of the pipeline's own call its guidance is. All else is asked
of all alike: the pipeline's own pictures at eta 0, a ratio of 1, a training step, adapters that diffusers reads.
"""

import shutil
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
from diffusion_gym.agents.benchmark.measures import Work
from diffusion_gym.agents.identity import fingerprint
from diffusion_gym.agents.rollout import collect, denoise
from diffusion_gym.agents.sharding import shard
from diffusion_gym.agents.training.env_options import EnvOptions
from diffusion_gym.devices import local_part
from diffusion_gym.models import load_model
from diffusion_gym.storage import read_json, write_json
from diffusion_gym.testing.random_ddpm import write_random_ddpm
from diffusion_gym.testing.random_flux import write_random_flux
from diffusion_gym.testing.random_pipeline import write_random_pipeline
from diffusion_gym.testing.random_qwen import write_random_flux2_klein, write_random_qwen_image, write_random_z_image
from diffusion_gym.testing.random_sana import write_random_sana
from diffusion_gym.testing.random_xl_sd3 import write_random_sd3, write_random_sdxl

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
        negative: whether the pipeline takes a negative prompt.
        options: of `write`.
    """

    write: Callable[..., Any]
    guidance: tuple[float, ...]
    call: Callable[[float], dict[str, Any]]
    size: tuple[tuple[int, int], tuple[int, int]] = ((8, 8), (8, 16))
    negative: bool = True
    options: dict[str, Any] = field(default_factory=dict)


def plainly(scale: float) -> dict[str, Any]:
    return {"guidance_scale": scale}


FAMILIES = {
    "sd": Family(write_random_pipeline, (1.0, 4.5), plainly),
    "sdxl": Family(write_random_sdxl, (1.0, 4.5), plainly),
    "sd3": Family(write_random_sd3, (1.0, 4.5), plainly),
    "flux-dev": Family(write_random_flux, (1.0, 3.5), plainly, negative=False),
    "flux-schnell": Family(write_random_flux, (1.0,), plainly, negative=False, options={"guidance_embeds": False}),
    "flux2-klein": Family(write_random_flux2_klein, (1.0, 4.0), plainly, negative=False),
    "qwen-image": Family(
        write_random_qwen_image, (1.0, 4.0), lambda scale: {"true_cfg_scale": scale, "negative_prompt": [""] * 3}
    ),
    "z-image": Family(write_random_z_image, (1.0, 4.0), lambda scale: {"guidance_scale": scale - 1}),
    "sana": Family(
        write_random_sana,
        (1.0, 4.5),
        lambda scale: {"guidance_scale": scale, "use_resolution_binning": False},
        ((32, 32), (32, 64)),  # the pipeline's own check, whatever the autoencoder
    ),
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


def load(folder, family, which=0, negative_prompt=None):
    height, width = family.size[which]
    options = {"height": height, "width": width, "negative_prompt": negative_prompt}
    return load_model(str(folder), "cpu", "float32", options)


def own_pipeline(folder):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    config = pipe.scheduler.config
    if config.get("use_flow_sigmas"):  # a multistep solver, which gives way to Euler
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=config["flow_shift"])
    elif "beta_schedule" in config:
        pipe.scheduler = diffusers.DDIMScheduler.from_config({"clip_sample": False, **config})
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
    packed = (
        model._packed(start(model))
        if getattr(model, "patch", 1) > 1 and hasattr(pipe, "_pack_latents")
        else start(model)
    )
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
    """At two sizes; at the second one with a negative prompt, in families that have one."""
    negative = "a green square" if which and family.negative else None
    pipe, seen = own_pipeline(folder), []
    for guidance in family.guidance:
        pushed = negative if guidance > 1 else None
        model = load(folder, family, which, pushed)
        said = {"negative_prompt": [pushed] * len(PROMPTS)} if pushed else {}
        pictures, expected = ours(model, guidance), theirs(pipe, model, family, guidance, **said)
        torch.testing.assert_close(pictures, expected, rtol=0, atol=1e-5)
        assert pictures.shape[2:] == family.size[which] and expected.std() > 1e-2
        assert (pictures[0] - pictures[1]).abs().max() > 1e-3
        seen.append(pictures)
    assert all((one - seen[0]).abs().max() > 1e-4 for one in seen[1:])
    if negative:
        assert (seen[-1] - ours(load(folder, family, which), family.guidance[-1])).abs().max() > 1e-4


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
    idle = [name for name, each in policy.trainable_parameters().items() if each.grad is None or not each.grad.any()]
    assert all("add_q_proj" in name or "to_add_out" in name for name in idle)  # the last block drops the text
    assert (weights(agent) - before).abs().max() > 1e-4


def test_what_a_benchmark_counts_as_network_evaluations(folder, family):
    """However a family calls its network, every sample of every step counts, and both branches of the guidance."""
    model = load(folder, family)
    for guidance in family.guidance:
        policy = DenoisingPolicy(model, SamplerConfig(STEPS, guidance_scale=guidance), lora_rank=2)
        work, branches = Work(policy), 1 if guidance == 1 or getattr(model, "embeds_guidance", False) else 2
        with work.counting(), torch.no_grad():
            policy.prediction(policy.observation(start(model), 1, model.tokenize(PROMPTS)))
        assert work.evaluations == len(PROMPTS) * branches


def test_adapters_load_in_plain_diffusers(folder, family, perturb, tmp_path):
    model = load(folder, family)
    config = SamplerConfig(num_inference_steps=STEPS, guidance_scale=1.0)
    policy = perturb(DenoisingPolicy(model, config, lora_rank=2, lora_alpha=5.0), 0.1)
    model.save_lora(tmp_path, policy.unet)
    pipe = own_pipeline(folder)
    pipe.load_lora_weights(str(tmp_path))

    @torch.no_grad()
    def output(network):
        times = torch.tensor([900.0, 500.5, 10.0])
        return model.predict(network, start(model), times, model.embed(model.tokenize(PROMPTS)))

    torch.testing.assert_close(output(getattr(pipe, model.NETWORK)), output(policy.unet), rtol=0, atol=1e-5)
    assert (output(policy.unet) - output(model.unet)).abs().max() > 1e-2
    begun = DenoisingPolicy(model, config, lora_rank=2, lora_alpha=3.0)
    begun.begin_from(tmp_path)
    torch.testing.assert_close(output(begun.unet), output(policy.unet), rtol=0, atol=1e-5)


def test_networks_of_all_families_are_spread_over_processes(folder_of, in_processes, perturb):
    """Prediction, the pretrained one and the gradient of the adapters, with activations computed again."""
    folders = {name: folder_of(name) for name in FAMILIES}

    def seen(policy, observation):
        torch.nn.Module.zero_grad(policy)
        reference = policy.prediction(observation, reference=True)
        prediction = policy.prediction(observation)
        prediction.square().mean().backward()
        grads = [each.grad for each in policy.trainable_parameters().values()]
        gradient = torch.cat([each.flatten() for each in grads if each is not None])  # the last block drops the text
        return prediction.detach(), reference, gradient

    def child(processes):
        found = {}
        for name, folder in folders.items():
            model, config = (
                load(folder, FAMILIES[name]),
                SamplerConfig(STEPS, guidance_scale=FAMILIES[name].guidance[-1]),
            )
            policies = []
            for _ in range(2):
                torch.manual_seed(0)
                policies.append(perturb(DenoisingPolicy(model, config, lora_rank=2), 0.1))
                policies[-1].set_training(gradient_checkpointing=True)
            observation = policies[0].observation(start(model), 1, model.tokenize(PROMPTS))
            whole = seen(policies[0], observation)
            shard(policies[1], processes)
            spread = seen(policies[1], observation)
            held = sum(local_part(each).numel() for each in policies[1].unet.parameters() if not each.requires_grad)
            total = sum(each.numel() for each in policies[0].unet.parameters() if not each.requires_grad)
            differences = [float((a - b).norm() / b.norm()) for a, b in zip(spread, whole, strict=True)]
            found[name] = [*differences, float((whole[0] - whole[1]).norm() / whole[1].norm()), held / total]
        return found

    for found in in_processes(2, child, seconds=600):
        for name, (prediction, reference, gradient, adapted, held) in found.items():
            assert prediction < 1e-5 and reference < 1e-5 and gradient < 1e-4, (name, found[name])
            assert adapted > 1e-3 and 0.4 < held < 0.6, (name, found[name])


@pytest.mark.parametrize("name", ["flux-schnell", "flux2-klein"])
def test_guidance_of_a_distilled_model_is_refused(folder_of, name, tmp_path):
    folder = shutil.copytree(folder_of(name), tmp_path / name)
    if name == "flux2-klein":
        index = read_json(folder / "model_index.json")
        write_json(folder / "model_index.json", {**index, "is_distilled": True})
    options = {"num_envs": 1, "model": str(folder), "prompts": PROMPTS, "height": 8, "width": 8}
    with pytest.raises(ValueError, match="guidance_scale=3.0 is nothing to model=.*distilled.*leave it at 1"):
        gym.make_vec("DiffusionDenoise-v0", guidance_scale=3.0, **options)
    assert gym.make_vec("DiffusionDenoise-v0", **options).unwrapped.sampler_config.guidance_scale == 1


@pytest.mark.parametrize("name, scale", [("sd3", 1.0), ("flux-dev", 3.5)])
def test_a_negative_prompt_that_has_no_effect_is_refused(folder_of, name, scale):
    options = {"model": str(folder_of(name)), "guidance_scale": scale, "negative_prompt": "fog"}
    with pytest.raises(ValueError, match="negative_prompt='fog' has no effect on model=.*leave it out"):
        gym.make_vec("DiffusionDenoise-v0", num_envs=1, **options)


@pytest.mark.parametrize(
    "size, message",
    [
        ({"height": 9}, "height=9 is no size of model=.*use a multiple of 4 pixels, such as 8 or 12"),
        ({"width": 0}, "width=0 is no size of model=.*such as 4 or 8"),
        ({"height": 8.0}, "height=8.0 is no size"),
        ({"width": -8}, "width=-8 is no size"),
        ({"height": True}, "height=True is no size"),
        ({"height": 64}, "height=64 is larger than model=.*has positions for; use at most 16"),
    ],
    ids=str,
)
def test_a_size_that_the_model_cannot_make_is_refused(folder_of, size, message):
    with pytest.raises(ValueError, match=message):
        gym.make_vec("DiffusionDenoise-v0", num_envs=1, model=str(folder_of("sd3")), **size)


def test_sizes_of_one_model_share_its_weights(folder_of):
    folder = str(folder_of("sd3"))

    def make(**size):
        return gym.make_vec("DiffusionDenoise-v0", num_envs=1, model=folder, prompts=PROMPTS, **size).unwrapped

    plain, wide = make(), make(width=16)
    assert plain.model.unet is wide.model.unet and plain.model.vae is wide.model.vae
    assert (plain.model.image_shape, wide.model.image_shape) == ((8, 8, 3), (8, 16, 3))
    assert wide.single_action_space.shape == (16, 4, 8) and make(width=16).model is wide.model
    options = EnvOptions(width=16, negative_prompt="fog").keywords()
    assert make(**options).model.negative_prompt == "fog" and not wide.model.negative_prompt


def test_a_model_of_one_size_says_so(tmp_path):
    write_random_ddpm(tmp_path)
    with pytest.raises(ValueError, match="height=16 is no option of model="):
        gym.make_vec("DiffusionDenoise-v0", num_envs=1, model=str(tmp_path), height=16)
    with pytest.raises(ValueError, match="text_encoder_device='cpu' is no option of model="):
        gym.make_vec("DiffusionDenoise-v0", num_envs=1, model=str(tmp_path), text_encoder_device="cpu")


def test_dynamic_shifting_follows_the_number_of_patches(folder_of):
    model = load_model(str(folder_of("flux-dev")), "cpu", "float32")
    config = SamplerConfig(num_inference_steps=4)
    small, large = (model.with_options(height=side, width=side).step_table(config).noise for side in (8, 256))
    assert (large[1:-1] > small[1:-1]).all()


def test_text_encoders_may_be_on_another_device(folder_of):
    model = load_model(str(folder_of("flux-dev")), "cpu", "float32", {"text_encoder_device": "cpu"})
    assert model.text_device == model.text_encoder_2.device == torch.device("cpu")
    with pytest.raises(ValueError, match="device='cuda:7' is not available here"):
        load_model(str(folder_of("flux-dev")), "cpu", "float32", {"text_encoder_device": "cuda:7"})


# --- embeddings on disk ---------------------------------------------------------------------------------------------


def test_embeddings_are_kept_on_disk_and_the_text_encoders_leave_memory(folder, family, tmp_path, monkeypatch):
    """What comes from disk, or from encoders that came back, is bit for bit what was encoded; so is the fingerprint."""
    plain = load(folder, family, negative_prompt="fog" if family.negative else None)
    expected = [plain.embed(plain.tokenize([prompt])) for prompt in PROMPTS]
    options = {name: each for name, each in {"negative_prompt": "fog"}.items() if family.negative}
    options |= {"embedding_cache": str(tmp_path), **dict(zip(("height", "width"), family.size[0], strict=True))}
    model, config = load_model(str(folder), "cpu", "float32", options), SamplerConfig(num_inference_steps=STEPS)
    config = SamplerConfig(num_inference_steps=STEPS, guidance_scale=family.guidance[-1])
    known, null = fingerprint(model, config), model.embed_null()
    assert torch.equal(null, plain.embed_null()) and not model.text_encoders.released
    assert torch.equal(model.embed(model.tokenize(PROMPTS[:2])), torch.cat(expected[:2]))
    model.text_encoders.release(model)
    assert model.text_encoders.released and fingerprint(model, config) == known
    encoded, own = [], type(model)._encode
    monkeypatch.setattr(type(model), "_encode", lambda self, *ids: encoded.append(1) or own(self, *ids))
    assert torch.equal(model.embed(model.tokenize(PROMPTS[:2])), torch.cat(expected[:2])) and not encoded
    assert torch.equal(model.embed_null(), null) and not encoded
    for _ in range(2):  # a prompt that is new, once
        assert torch.equal(model.embed(model.tokenize(PROMPTS[2:])), expected[2]) and len(encoded) <= 1
    assert model.text_encoders.released


# --- which layers have adapters ----------------------------------------------------------------------------------


def test_the_text_s_stream_has_adapters_and_targets_are_a_choice(folder_of):
    model = load_model(str(folder_of("flux-dev")), "cpu", "float32")
    config = SamplerConfig(num_inference_steps=STEPS)
    names = {name.split(".lora_")[0] for name in DenoisingPolicy(model, config).trainable_parameters()}
    ends = {name.rpartition("attn.")[2] for name in names}
    assert ends == {"to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
    chosen = DenoisingPolicy(model, config, lora_targets=["proj_mlp"]).trainable_parameters()
    assert all(".proj_mlp." in name for name in chosen) and chosen
    with pytest.raises(ValueError, match="lora_targets='to_query' is unknown; did you mean"):
        DenoisingPolicy(model, config, lora_targets=["to_q", "to_query"])


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan")])
def test_an_alpha_that_is_none_is_refused(folder_of, alpha):
    model = load_model(str(folder_of("flux-dev")), "cpu", "float32")
    with pytest.raises(ValueError, match="lora_alpha="):
        DenoisingPolicy(model, SamplerConfig(), lora_alpha=alpha)
