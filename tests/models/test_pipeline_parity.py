"""Every family with every scheduler that a folder may hold, against diffusers' own `pipe(...)` at eta 0.

The schedulers' configs are fresh ones: those that `from_config` makes of another's have fields that they would not.
Both sides compute in float64 where diffusers can, so that 1e-5 is of the maths and not of the rounding, which
1 / signal makes larger by up to 157 and which differs between processors.
"""

import inspect
import warnings
from unittest.mock import patch

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel

from diffusion_gym import SamplerConfig
from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.agents.rollout import denoise
from diffusion_gym.models import load_model
from diffusion_gym.models.latent import LatentModel
from diffusion_gym.models.pixel import PixelModel
from diffusion_gym.models.schedulers import FLOW_SOLVERS, PRESERVING
from diffusion_gym.models.sd3 import SD3Model
from diffusion_gym.models.sdxl import SDXLModel
from diffusion_gym.storage import read_json, write_json
from diffusion_gym.testing.random_ddpm import write_random_ddpm

PROMPTS = ["a red circle", "two blue stars", ""]
STEPS, GUIDANCE = 5, 3.0
MODELS = {
    "StableDiffusionPipeline": LatentModel,
    "StableDiffusionXLPipeline": SDXLModel,
    "StableDiffusion3Pipeline": SD3Model,
    "DDIMPipeline": PixelModel,
}
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = [kind for kind in PRESERVING if kind != "DPMSolverSDEScheduler"]  # which needs torchsde
PREDICTIONS = ["epsilon", "v_prediction", "sample"]
SPACINGS = ["leading", "linspace", "trailing"]
FLOWS = {
    "fresh": {},
    "shift": {"shift": 3.0},
    "dynamic": {"use_dynamic_shifting": True},
    "dynamic-linear": {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    "terminal": {"shift": 3.0, "shift_terminal": 0.1},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
}


def own_pipeline(path, dtype=torch.float64):
    """Diffusers' pipeline of a folder, as it comes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # that it corrects the config
        pipe = diffusers.DiffusionPipeline.from_pretrained(path, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_ddim(pipe):
    """The pipeline with DDIM in its scheduler's place, which clamps where the pipeline's own scheduler does."""
    config = {name: value for name, value in pipe.scheduler.config.items() if name != "_use_default_values"}
    ddim = DDIMScheduler.from_config({"clip_sample": False, **config})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        pipe = type(pipe).from_pipe(pipe, scheduler=ddim, torch_dtype=pipe.dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def in_double(scheduler):
    for name in ("alphas_cumprod", "final_alpha_cumprod"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())


def load(path, dtype=torch.float64):
    """Our model of a folder, in a type that `load_model` does not offer."""
    kind = MODELS[read_json(path / "model_index.json")["_class_name"]]
    return kind(path, device=torch.device("cpu"), dtype=dtype)


def start(model):
    return torch.randn(len(PROMPTS), *model.latent_shape, generator=torch.Generator().manual_seed(5)).to(model.dtype)


@torch.no_grad()
def ours(model, guidance=GUIDANCE):
    """x_0 by the means of the policy's Gaussians, and its pictures, all in the model's type."""
    config = SamplerConfig(num_inference_steps=STEPS, guidance_scale=guidance, eta=0.0)
    with patch.object(torch.Tensor, "float", lambda tensor: tensor.to(model.dtype)):
        policy = DenoisingPolicy(model, config)
        policy.table = model.step_table(config).to("cpu", model.dtype)
        x = denoise(policy, start(model), model.tokenize(PROMPTS) if model.prompt_length else None)
        return x, model.decode(x)


def check(path, pipe, guidance=GUIDANCE):
    """Latents, relative to their largest, and pictures are those of the pipeline to 1e-5."""
    model, seen = load(path, pipe.dtype), []
    latents, pictures = ours(model, guidance)
    options = {"eta": 0.0} if "eta" in inspect.signature(pipe.__call__).parameters else {}
    in_double(pipe.scheduler)
    expected = pipe(
        PROMPTS,
        latents=start(model),
        guidance_scale=guidance,
        num_inference_steps=STEPS,
        output_type="pt",
        callback_on_step_end=lambda pipe, step, t, state: seen.append(state["latents"]) or {},
        **options,
    ).images
    assert len(seen) == STEPS and seen[-1].dtype == latents.dtype == pictures.dtype == pipe.dtype
    assert ((latents - seen[-1]).abs().max() / seen[-1].abs().max()) <= 1e-5
    torch.testing.assert_close(pictures, expected, rtol=0, atol=1e-5)
    assert seen[-1].std() > 0.1 and expected.std() > 1e-3
    return model


# --- schedulers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_fresh_scheduler_of_any_class_samples_as_the_pipeline(folder, family, kind):
    path = folder(family, getattr(diffusers, kind)())
    model = check(path, with_ddim(own_pipeline(path)))
    clamps = family == "sdxl" and kind.startswith(("DDIM", "DDPM"))
    assert model.step_table(SamplerConfig()).clip_x0 == (1.0 if clamps else None)


@pytest.mark.parametrize("kind", ["DDIMScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_every_prediction_and_spacing_samples_as_the_pipeline(folder, family, prediction, spacing, kind):
    options = {**STABLE_DIFFUSION, "prediction_type": prediction, "timestep_spacing": spacing}
    path = folder(family, getattr(diffusers, kind)(**options))
    check(path, with_ddim(own_pipeline(path)))


@pytest.mark.parametrize(
    "options",
    [
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        {"trained_betas": torch.linspace(0.0005, 0.015, 1000).tolist()},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"num_train_timesteps": 500},
        {"set_alpha_to_one": False, "steps_offset": 3},
        {"clip_sample": True, "clip_sample_range": 2.0},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_other_noise_schedules_sample_as_the_pipeline(folder, family, options):
    path = folder(family, DDIMScheduler(**{"prediction_type": "v_prediction", "clip_sample": False, **options}))
    check(path, own_pipeline(path))


@pytest.mark.parametrize(
    "kind, absent",
    [
        ("DDIMScheduler", ["clip_sample", "steps_offset", "set_alpha_to_one", "prediction_type"]),
        ("HeunDiscreteScheduler", ["beta_start", "beta_end", "timestep_spacing", "num_train_timesteps"]),
        ("LCMScheduler", ["beta_start", "beta_end", "beta_schedule"]),
    ],
)
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_field_that_is_absent_has_the_default_of_the_scheduler_s_class(folder, family, kind, absent):
    """As in the pipeline itself; `DDIMScheduler.from_config` alone would take its own."""
    own = {"clip_sample": False} if family == "sdxl" and kind == "DDIMScheduler" else {}
    path = folder(family, getattr(diffusers, kind)(), scheduler={**dict.fromkeys(absent, "absent"), **own})
    pipe = own_pipeline(path)
    check(path, pipe if kind == "DDIMScheduler" else with_ddim(pipe))


@pytest.mark.parametrize("options", FLOWS.values(), ids=FLOWS)
def test_a_fresh_flow_samples_as_the_pipeline(folder, options):
    path = folder("sd3", FlowMatchEulerDiscreteScheduler(**options))
    check(path, own_pipeline(path, torch.float32))


@pytest.mark.parametrize("kind", ["FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"])
def test_another_solver_of_a_flow_gives_way_to_euler(folder, kind):
    path = folder("sd3", getattr(diffusers, kind)(shift=3.0))
    pipe = own_pipeline(path, torch.float32)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    check(path, pipe)


@pytest.mark.parametrize("kind", FLOW_SOLVERS)
def test_a_multistep_solver_of_a_flow_gives_way_to_euler_with_its_shift(folder, kind):
    options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    path = folder("sd3", getattr(diffusers, kind)(**options))
    pipe = own_pipeline(path, torch.float32)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    model = check(path, pipe)
    model.save_pipeline(str(path.parent / "saved"), model.unet)
    check(path.parent / "saved", own_pipeline(path.parent / "saved", torch.float32))


# --- networks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_network_is_told_the_guidance_scale(base, folder, family):
    """As consistency models distilled from a guided one are; the scale counts, and there is no empty prompt."""
    torch.manual_seed(0)
    config = UNet2DConditionModel.load_config(base(family), subfolder="unet")
    unet = UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": 9})
    path = folder(family, diffusers.LCMScheduler(), weights=[("unet", unet)])
    pipe = with_ddim(own_pipeline(path))
    model = check(path, pipe, guidance=8.0)
    check(path, pipe, guidance=1.0)
    assert (ours(model, 8.0)[1] - ours(model, 1.0)[1]).abs().max() > 1e-3


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("zeros", [True, False])
def test_only_the_negative_prompt_is_zeros_where_the_pipeline_says_so(folder, zeros, guidance):
    """One of the prompts is empty."""
    path = folder("sdxl", DDIMScheduler(**STABLE_DIFFUSION, clip_sample=False))
    index = read_json(path / "model_index.json")
    write_json(path / "model_index.json", {**index, "force_zeros_for_empty_prompt": zeros})
    assert "" in PROMPTS
    check(path, own_pipeline(path), guidance)


def test_the_mean_and_deviation_of_the_latents_are_those_of_the_autoencoder(folder):
    vae = {"latents_mean": [0.1, -0.2, 0.3, 0.5], "latents_std": [1.5, 0.5, 2.0, 3.0]}
    path = folder("sdxl", DDIMScheduler(**STABLE_DIFFUSION, clip_sample=False), vae=vae)
    check(path, own_pipeline(path))


def test_an_outdated_network_makes_pictures_of_the_corrected_size(folder):
    unet = {"_diffusers_version": "0.8.1"}
    path = folder("sd", DDIMScheduler(**STABLE_DIFFUSION), unet=unet)
    assert own_pipeline(path).unet.config.sample_size == 64
    model = load(path)
    assert (model.latent_shape, model.image_shape) == ((4, 64, 64), (128, 128, 3))


# --- exports ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DDPMScheduler"])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_an_export_samples_in_diffusers_as_the_model_does(folder, family, kind):
    path = folder(family, getattr(diffusers, kind)())
    model = load(path)
    model.save_pipeline(str(path.parent / "saved"), model.unet)
    saved = check(path.parent / "saved", own_pipeline(path.parent / "saved"))
    torch.testing.assert_close(ours(model)[0], ours(saved)[0], rtol=1e-9, atol=0)


# --- pixels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "PNDMScheduler"])
def test_a_ddim_pipeline_of_pixels_samples_as_diffusers(monkeypatch, tmp_path, kind):
    """Its constructor makes a DDIM scheduler of any other, which clamps where the other says nothing."""
    path = write_random_ddpm(tmp_path, pipeline="DDIMPipeline")
    getattr(diffusers, kind)().save_pretrained(path / "scheduler")
    index = read_json(path / "model_index.json")
    write_json(path / "model_index.json", {**index, "scheduler": ["diffusers", kind]})
    model, pipe = load(path), own_pipeline(path)
    in_double(pipe.scheduler)
    monkeypatch.setattr("diffusers.pipelines.ddim.pipeline_ddim.randn_tensor", lambda *_, **__: start(model))
    expected = pipe(len(PROMPTS), eta=0.0, num_inference_steps=STEPS, output_type="np").images
    pictures = ours(model, guidance=1.0)[1]
    assert model.step_table(SamplerConfig()).clip_x0 == 1.0 and expected.std() > 0.1
    torch.testing.assert_close(pictures.permute(0, 2, 3, 1), torch.as_tensor(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind, bound", [("DDPMScheduler", 1.0), ("DDIMScheduler", 1.0), ("LCMScheduler", None)])
def test_a_ddpm_pipeline_of_pixels_clamps_where_its_scheduler_does(tmp_path, kind, bound):
    path = write_random_ddpm(tmp_path, pipeline="DDPMPipeline")
    getattr(diffusers, kind)().save_pretrained(path / "scheduler")
    index = read_json(path / "model_index.json")
    write_json(path / "model_index.json", {**index, "scheduler": ["diffusers", kind]})
    assert load_model(str(path), "cpu", "float32").step_table(SamplerConfig()).clip_x0 == bound
