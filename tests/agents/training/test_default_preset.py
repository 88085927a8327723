"""Which hyperparameters a run begins with where none are asked for."""

import pytest

from diffusion_gym.agents.training.presets import PRESETS, default_preset


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
