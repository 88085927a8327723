"""Every environment id against Gymnasium's own checker; every model and every reward against the vector suite.

Models and rewards whose weights are not in the package run on tiny random ones, which the same classes load.
"""

import warnings
from functools import cache

import gymnasium as gym
import pytest
from gymnasium.utils.env_checker import check_env

from diffusion_gym.envs.registration import GENERIC_ID, environment_ids
from diffusion_gym.models import MODELS
from diffusion_gym.models.shapes import WEIGHTS
from diffusion_gym.rewards import REWARDS
from diffusion_gym.testing.conformance import check_vector_env
from diffusion_gym.testing.random_checkpoints import CHECKPOINTS
from diffusion_gym.testing.random_ddpm import write_random_ddpm

needs_weights = pytest.mark.skipif(not (WEIGHTS / "unet").is_dir(), reason=f"no weights in {WEIGHTS}")


def _cases():
    """(id, on a tiny model?): its 8x8 pictures do not suit the rewards of the embedded model's pictures.

    One id stands for all whose tiny model and reward are the same.
    """
    yield pytest.param(GENERIC_ID, True)
    seen = set()
    for id_, keywords in environment_ids().items():
        alike = keywords["reward"], "prompt" in MODELS.traits(keywords["model"])
        if REWARDS.fits(keywords["reward"], {"prompt", "photo", "face"}) and alike not in seen:
            seen.add(alike)
            yield pytest.param(id_, True)
        if keywords["model"] == "Shapes":
            yield pytest.param(id_, False, marks=needs_weights, id=f"{id_}-real")


def _covering():
    """Of those, as few as have every model and every reward: what a reward sees of a model is a picture."""
    known = set()
    for case in _cases():
        parts = set(environment_ids().get(case.values[0], {"generic": ""}).items()) | {("tiny", case.values[1])}
        if parts - known:
            known |= parts
            yield case


@pytest.fixture(scope="module")
def tiny_ddpm(tmp_path_factory):
    return write_random_ddpm(tmp_path_factory.mktemp("models") / "tiny-ddpm")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """`checkpoint(reward)`: the keywords that point a reward to tiny random weights, of the very same classes."""

    @cache
    def written(reward):
        return CHECKPOINTS[reward](tmp_path_factory.mktemp(reward)) if reward in CHECKPOINTS else {}

    return written


@pytest.fixture
def keywords(id_, on_tiny, tiny_pipeline, tiny_ddpm, checkpoint):
    asked = environment_ids().get(id_, {"model": "SD14", "reward": None})
    given = {"num_inference_steps": 3}
    if on_tiny:
        given["model"] = str(tiny_pipeline if "prompt" in MODELS.traits(asked["model"]) else tiny_ddpm)
    return {**given, "reward_kwargs": checkpoint(asked["reward"])}


@pytest.mark.parametrize(("id_", "on_tiny"), list(_cases()))
def test_single_env_passes_gymnasiums_checker_without_a_warning(id_, on_tiny, keywords):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="prompts=.* are cut")  # the tiny tokenizers spell their words
        check_env(gym.make(id_, **keywords).unwrapped)


@pytest.mark.parametrize(("id_", "on_tiny"), list(_covering()))
def test_vector_env_conforms(id_, on_tiny, keywords):
    check_vector_env(lambda **more: gym.make_vec(id_, **keywords, **more))


@pytest.mark.parametrize("steps", [1, 2])
def test_vector_env_conforms_where_episodes_are_short(steps, tiny_pipeline):
    keywords = {"model": str(tiny_pipeline), "num_inference_steps": steps}
    check_vector_env(lambda **more: gym.make_vec(GENERIC_ID, **keywords, **more))


def test_every_model_has_an_id_for_every_reward_that_fits():
    found = {(keywords["model"], keywords["reward"]) for keywords in environment_ids().values()}
    assert found == {
        (model, reward) for model in MODELS for reward in REWARDS if REWARDS.fits(reward, MODELS.traits(model))
    }
    assert {model for model, _ in found} == set(MODELS)
    assert {reward for _, reward in found} == set(REWARDS)
