"""Fields of somebody else's configs that change the samples: each is followed or refused, none is passed over."""

import inspect

import diffusers
import pytest
from diffusers.schedulers import KarrasDiffusionSchedulers

from diffusion_gym import SamplerConfig
from diffusion_gym.models import load_model
from diffusion_gym.models.fields import FLOW_SCHEDULER, FLOW_SOLVER, VARIANCE_PRESERVING
from diffusion_gym.models.schedulers import FLOW, FLOW_SOLVERS, PRESERVING
from diffusion_gym.storage import read_json, write_json

REFUSED = [
    ("sd", "DDIMScheduler", "scheduler", {"thresholding": True}),
    ("sdxl", "EulerDiscreteScheduler", "scheduler", {"use_karras_sigmas": True}),
    ("sd", "EulerDiscreteScheduler", "scheduler", {"use_exponential_sigmas": True}),
    ("sd", "HeunDiscreteScheduler", "scheduler", {"use_beta_sigmas": True}),
    ("sd", "EulerDiscreteScheduler", "scheduler", {"timestep_type": "continuous"}),
    ("sd", "EulerDiscreteScheduler", "scheduler", {"final_sigmas_type": "sigma_min"}),
    ("sd", "EulerDiscreteScheduler", "scheduler", {"sigma_max": 20.0}),
    ("sd", "DPMSolverMultistepScheduler", "scheduler", {"use_lu_lambdas": True}),
    ("sd", "DPMSolverMultistepScheduler", "scheduler", {"use_flow_sigmas": True}),
    ("sd", "DPMSolverMultistepScheduler", "scheduler", {"lambda_min_clipped": -5.1}),
    ("sd", "DPMSolverMultistepScheduler", "scheduler", {"variance_type": "learned_range"}),
    ("sd", "DDPMScheduler", "scheduler", {"beta_schedule": "sigmoid"}),
    ("sd", "DDIMScheduler", "scheduler", {"prediction_type": "flow_prediction"}),
    ("sd", "DDIMScheduler", "scheduler", {"timestep_spacing": "quadratic"}),
    ("sd", "DDIMScheduler", "scheduler", {"a_field_to_come": 2.0}),
    ("sd3", "FlowMatchEulerDiscreteScheduler", "scheduler", {"stochastic_sampling": True}),
    ("sd3", "FlowMatchEulerDiscreteScheduler", "scheduler", {"invert_sigmas": True}),
    ("sd3", "FlowMatchLCMScheduler", "scheduler", {"scale_factors": [0.5, 1.0]}),
    ("sd", "DDIMScheduler", "unet", {"class_embed_type": "timestep"}),
    ("sd", "DDIMScheduler", "unet", {"num_class_embeds": 10}),
    ("sd", "DDIMScheduler", "unet", {"encoder_hid_dim_type": "image_proj"}),
    ("sd", "DDIMScheduler", "unet", {"addition_embed_type": "text_time"}),
    ("sdxl", "DDIMScheduler", "unet", {"addition_embed_type": "text_image"}),
    ("sd", "DDIMScheduler", "vae", {"shift_factor": 0.1}),
    ("sd", "DDIMScheduler", "vae", {"latents_mean": [0.0, 0.0, 0.0, 0.1]}),
    ("sdxl", "DDIMScheduler", "vae", {"shift_factor": 0.1}),
    ("sd3", "FlowMatchEulerDiscreteScheduler", "vae", {"latents_std": [2.0] * 16}),
    ("sd", "DDIMScheduler", "text_encoder", {"use_attention_mask": True}),
]


NUMBERS = [
    ("scheduler", {"num_train_timesteps": "1000"}),
    ("scheduler", {"num_train_timesteps": 0}),
    ("scheduler", {"beta_start": None}),
    ("scheduler", {"beta_end": "0.02"}),
    ("scheduler", {"trained_betas": 0.02}),
    ("scheduler", {"steps_offset": -1}),
    ("vae", {"scaling_factor": None}),
    ("vae", {"scaling_factor": 0}),
]


@pytest.mark.parametrize(
    "family, kind, part, change", REFUSED, ids=[f"{each[0]}-{each[2]}-{next(iter(each[3]))}" for each in REFUSED]
)
def test_a_field_that_is_not_followed_is_refused(folder, family, kind, part, change):
    path = folder(family, getattr(diffusers, kind)(), **{part: change})
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"has {name}=") as caught:
        load_model(str(path), "cpu", "float32")
    assert repr(value) in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("part, change", NUMBERS, ids=[f"{next(iter(each[1]))}" for each in NUMBERS])
def test_a_field_of_another_type_is_refused(folder, part, change):
    path = folder("sd", diffusers.DDIMScheduler(), **{part: change})
    ((name, value),) = change.items()
    with pytest.raises(
        ValueError, match=rf"model='{path}': .*config.json, {name}: .*; write what the model was"
    ) as caught:
        load_model(str(path), "cpu", "float32")
    assert repr(value) in str(caught.value)


def test_a_flow_whose_pictures_have_no_scale_is_refused(folder):
    path = folder("sd3", diffusers.FlowMatchEulerDiscreteScheduler(), vae={"scaling_factor": 0})
    with pytest.raises(ValueError, match=r"vae/config.json, scaling_factor: .*; write what the model was"):
        load_model(str(path), "cpu", "float32")


def test_dynamic_shifting_between_equal_lengths_is_refused(folder):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=256)
    model = load_model(str(folder("sd3", scheduler)), "cpu", "float32")
    with pytest.raises(ValueError, match=r"max_image_seq_len=256 in scheduler/scheduler_config.json must differ from"):
        model.step_table(SamplerConfig(num_inference_steps=2))


@pytest.mark.parametrize("name", [["a"], 3, None])
def test_a_pipeline_without_a_class_is_refused(folder, name):
    path = folder("sd")
    write_json(path / "model_index.json", {**read_json(path / "model_index.json"), "_class_name": name})
    with pytest.raises(ValueError, match="names no pipeline in _class_name; pass a directory that"):
        load_model(str(path), "cpu", "float32")


@pytest.mark.parametrize(
    "family, option", [("sdxl", "requires_aesthetics_score"), ("sd", "an_option_to_come"), ("sd3", "an_option_to_come")]
)
def test_an_option_of_the_pipeline_that_is_not_followed_is_refused(folder, family, option):
    path = folder(family)
    write_json(path / "model_index.json", {**read_json(path / "model_index.json"), option: True})
    with pytest.raises(ValueError, match=f"model_index.json has {option}=True"):
        load_model(str(path), "cpu", "float32")


@pytest.mark.parametrize(
    "family, kind",
    [
        ("sd", "FlowMatchEulerDiscreteScheduler"),
        ("sdxl", "EDMEulerScheduler"),
        ("sd", "DDIMInverseScheduler"),
        ("sd", "CogVideoXDDIMScheduler"),
        ("sd3", "DDIMScheduler"),
        ("sd3", "EulerDiscreteScheduler"),
        ("sd3", "DPMSolverMultistepScheduler"),
    ],
)
def test_a_scheduler_of_another_kind_of_model_is_refused(folder, family, kind):
    path = folder(family, getattr(diffusers, kind)())
    with pytest.raises(ValueError, match=f"its scheduler, {kind}, "):
        load_model(str(path), "cpu", "float32")


def test_the_fields_of_all_schedulers_of_diffusers_are_known():
    """A new field of a scheduler class is entered in the table, as followed or as refused."""
    offered = {kind.name for kind in KarrasDiffusionSchedulers}  # what the pipelines' own annotation allows
    assert offered - {"EDMEulerScheduler"} <= set(PRESERVING)
    plain = [kind for kind in PRESERVING if kind != "DPMSolverSDEScheduler"]  # which needs torchsde
    for kinds, known in ((plain, VARIANCE_PRESERVING), (FLOW, FLOW_SCHEDULER), (FLOW_SOLVERS, FLOW_SOLVER)):
        for kind in kinds:
            fields = set(inspect.signature(getattr(diffusers, kind)).parameters)
            assert fields <= set(known), (kind, fields - set(known))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("kind", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_predicted_noise_without_a_terminal_signal_is_refused(folder, kind, sampler):
    """The mean is infinite at t = 999, which `leading` does not visit."""
    options = {"rescale_betas_zero_snr": True}
    path = folder("sdxl", getattr(diffusers, kind)(**options, timestep_spacing="trailing"))
    model = load_model(str(path), "cpu", "float32")
    with pytest.raises(ValueError, match="prediction_type='epsilon' at timestep 999 .* 'v_prediction'"):
        model.step_table(SamplerConfig(num_inference_steps=10, sampler=sampler))
    model.scheduler_config = {**model.scheduler_config, "timestep_spacing": "leading"}
    assert model.step_table(SamplerConfig(num_inference_steps=10, sampler=sampler)).coef_x0.isfinite().all()
