"""Which hyperparameters a run begins with where none are asked for."""

import pytest

from diffusion_gym.agents.training.presets import PRESETS, default_preset
from diffusion_gym.agents.training.settings import starting_point
from diffusion_gym.config import SamplerConfig


@pytest.mark.parametrize(
    ("env", "model", "agent", "preset"),
    [
        ("DiffusionDenoise-Shapes-Color-v0", None, "ddpo_is", "shapes"),
        ("DiffusionDenoise-v0", "Shapes", "dpok", "shapes"),
        ("DiffusionDenoise-ShapesFlow-Count", None, "ddpo_is", "shapes-flow"),
        ("DiffusionDenoise-SD14-Aesthetic", None, "ddpo_is", "ddpo-paper"),
        ("DiffusionDenoise-SD14-Aesthetic", None, "dpok", "dpok"),
        ("DiffusionDenoise-v0", "some/folder", "rwr", "ddpo-paper"),
        ("DiffusionDenoise-CelebaHQ-Compressibility", None, "ddpo_is", "thesis-compressibility"),
        ("DiffusionDenoise-Church-Incompressibility-v0", None, "ddpo_is", "thesis-incompressibility"),
        ("DiffusionDenoise-CelebaHQ-Over50-v0", None, "ddpo_is", "thesis-aesthetic"),
        ("DiffusionDenoise-v0", "Bedroom", "ddpo_sf", "thesis-aesthetic"),
        ("DiffusionDenoise-CelebaHQ-Compressibility", "SD14", "ddpo_is", "ddpo-paper"),
    ],
)
def test_preset_is_that_of_the_models_or_the_agents_paper(env, model, agent, preset):
    assert default_preset(env, model, agent) == preset
    assert preset in PRESETS


@pytest.mark.parametrize("env", ["DiffusionDenoise-FLUX1Schnell-OCR-v0", "DiffusionDenoise-SD14-Aesthetic-v0"])
def test_the_model_says_how_it_is_sampled_where_no_preset_is_of_it(env):
    options = starting_point(env, "ddpo_is", None, None).env_options
    assert (options.num_inference_steps, options.guidance_scale, options.eta, options.sampler) == (None,) * 4
    assert starting_point(env, "ddpo_is", "ddpo-paper", None).env_options.guidance_scale == 5.0
    assert SamplerConfig() == SamplerConfig(num_inference_steps=50, guidance_scale=5.0, eta=1.0)  # the paper's too
