"""SamplerConfig: the paper's defaults, and an error for each value that makes no sense."""

import dataclasses
import math

import pytest

from diffusion_gym import SamplerConfig


def test_defaults_are_those_of_the_paper():
    expected = {
        "num_inference_steps": 50,
        "guidance_scale": 5.0,
        "eta": 1.0,
        "sigma_min": 0.0,
        "log_prob_reduction": "mean",
        "sampler": "ddim",
        "noisy_steps": None,
    }
    assert dataclasses.asdict(SamplerConfig()) == expected


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_inference_steps", 0),
        ("num_inference_steps", -3),
        ("num_inference_steps", 2.5),
        ("num_inference_steps", "50"),
        ("guidance_scale", -0.1),
        ("guidance_scale", math.inf),
        ("guidance_scale", math.nan),
        ("eta", -0.01),
        ("eta", 1.01),
        ("eta", math.nan),
        ("sigma_min", -1e-9),
        ("sigma_min", math.inf),
        ("sigma_min", math.nan),
        ("log_prob_reduction", "max"),
        ("log_prob_reduction", None),
        ("sampler", "euler"),
    ],
)
def test_a_value_out_of_range_is_named(name, value):
    with pytest.raises(ValueError) as error:
        SamplerConfig(**{name: value})
    assert f"{name}={value!r} must" in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"num_inference_steps": 1},
        {"guidance_scale": 0.0},
        {"guidance_scale": 1},
        {"eta": 0},
        {"sigma_min": 0.0},
        {"log_prob_reduction": "sum"},
        {"sampler": "ddpm"},
    ],
)
def test_the_ends_of_the_ranges_are_allowed(options):
    (name, value) = next(iter(options.items()))
    assert getattr(SamplerConfig(**options), name) == value


def test_it_cannot_be_changed_behind_the_policys_back():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplerConfig().eta = 0.5


def test_options_win_over_the_models_defaults():
    config = SamplerConfig.from_options({"eta": 0.5}, {"eta": 0.2, "num_inference_steps": 7})
    assert (config.eta, config.num_inference_steps, config.guidance_scale) == (0.5, 7, 5.0)


def test_a_misspelt_option_gets_a_suggestion():
    with pytest.raises(TypeError, match="'guidence_scale' is unknown; did you mean 'guidance_scale'"):
        SamplerConfig.from_options({"guidence_scale": 3.0}, {})


def test_a_misspelt_option_raises_at_the_environment(make_env):
    with pytest.raises(TypeError, match="did you mean 'num_inference_steps'"):
        make_env(num_inference_step=3)
