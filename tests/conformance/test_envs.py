"""Every environment id against Gymnasium's own checker and against the project's vector suite.

Models whose weights are not in the package run as the tiny random pipeline, which the same class loads.
"""

import warnings

import gymnasium as gym
import pytest
from gymnasium.utils.env_checker import check_env

from diffusion_gym.envs.conformance import check_vector_env
from diffusion_gym.envs.registration import GENERIC_ID, environment_ids
from diffusion_gym.models import MODELS
from diffusion_gym.models.shapes import WEIGHTS
from diffusion_gym.rewards import REWARDS

needs_weights = pytest.mark.skipif(not (WEIGHTS / "unet").is_dir(), reason=f"no weights in {WEIGHTS}")


def _cases():
    """(id, on the tiny pipeline?): its 8x8 pictures do not suit the rewards that are for one model's pictures."""
    yield pytest.param(GENERIC_ID, True)
    for id_, keywords in environment_ids().items():
        if all(REWARDS.fits(keywords["reward"], model) for model in MODELS):
            yield pytest.param(id_, True)
        if keywords["model"] == "Shapes":
            yield pytest.param(id_, False, marks=needs_weights, id=f"{id_}-real")


@pytest.fixture
def keywords(on_tiny, tiny_pipeline):
    model = {"model": str(tiny_pipeline)} if on_tiny else {}
    return {**model, "num_inference_steps": 3}


@pytest.mark.parametrize(("id_", "on_tiny"), list(_cases()))
def test_single_env_passes_gymnasiums_checker_without_a_warning(id_, on_tiny, keywords):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make(id_, **keywords).unwrapped)


@pytest.mark.parametrize(("id_", "on_tiny"), list(_cases()))
def test_vector_env_conforms(id_, on_tiny, keywords):
    check_vector_env(lambda **more: gym.make_vec(id_, **keywords, **more))


@pytest.mark.parametrize("steps", [1, 2])
def test_vector_env_conforms_where_episodes_are_short(steps, tiny_pipeline):
    keywords = {"model": str(tiny_pipeline), "num_inference_steps": steps}
    check_vector_env(lambda **more: gym.make_vec(GENERIC_ID, **keywords, **more))


def test_every_model_has_an_id_for_every_reward_that_fits():
    found = {(keywords["model"], keywords["reward"]) for keywords in environment_ids().values()}
    assert found == {(model, reward) for model in MODELS for reward in REWARDS if REWARDS.fits(reward, model)}
    assert {model for model, _ in found} == set(MODELS)
    assert {reward for _, reward in found} == set(REWARDS)
