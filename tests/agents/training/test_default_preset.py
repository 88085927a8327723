"""Which hyperparameters a run begins with where none are asked for."""

import pytest

from diffusion_gym.agents.training.presets import PRESETS, default_preset
from diffusion_gym.agents.training.settings import starting_point
from diffusion_gym.models.shapes import WEIGHTS as SHAPES
from diffusion_gym.models.shapes_flow import WEIGHTS as SHAPES_FLOW
from diffusion_gym.testing.random_xl_sd3 import write_random_sd3


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


def sampling(env, preset=None, model=None):
    options = starting_point(env, "ddpo_is", preset, model).env_options
    return options.num_inference_steps, options.guidance_scale, options.eta, options.sampler


PAPER, NONE = (50, 5.0, 1.0, "ddim"), (None,) * 4


def test_a_family_with_a_sampler_of_its_own_keeps_it_where_no_preset_is_of_it(tmp_path):
    flow = write_random_sd3(tmp_path / "flow")
    assert sampling("DiffusionDenoise-FLUX1Schnell-OCR-v0") == NONE
    assert sampling("DiffusionDenoise-v0", model=str(flow)) == NONE
    assert sampling("DiffusionDenoise-v0", model=str(SHAPES_FLOW)) == NONE
    assert sampling("DiffusionDenoise-v0", "ddpo-paper", str(flow)) == PAPER
    for env, model in (("SD14-Aesthetic-v0", None), ("v0", "a/hub-id"), ("v0", str(SHAPES))):
        assert sampling(f"DiffusionDenoise-{env}", model=model) == PAPER
