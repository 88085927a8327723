"""The ids, how Gymnasium resolves them."""

import warnings

import gymnasium as gym
import pytest
from gymnasium.vector import VectorEnv

import diffusion_gym
from diffusion_gym.envs.denoising import DenoisingEnv
from diffusion_gym.envs.registration import GENERIC_ID, environment_ids, register_all
from diffusion_gym.envs.vector import DenoisingVectorEnv


def test_documented_ids_are_registered():
    for name in ("Shapes-Color", "Shapes-Count", "Shapes-Composition", "Shapes-Location", "SD14-Compressibility"):
        assert f"DiffusionDenoise-{name}-v0" in gym.registry
    assert GENERIC_ID == "DiffusionDenoise-v0" and GENERIC_ID in gym.registry


def test_shapes_rewards_are_for_shapes_alone():
    assert "DiffusionDenoise-SD14-Composition-v0" not in gym.registry


@pytest.mark.parametrize("id_", environment_ids())
def test_id_says_model_and_reward(id_):
    _, model, reward, version = id_.split("-")
    assert gym.spec(id_).kwargs == {"model": model, "reward": reward} and version == "v0"


def test_keywords_go_over_those_of_the_id(tiny_pipeline):
    env = gym.make("DiffusionDenoise-SD14-Compressibility-v0", model=str(tiny_pipeline), reward="Incompressibility")
    assert env.unwrapped.vector.model.name == str(tiny_pipeline)
    assert env.unwrapped.vector.reward.name == "Incompressibility"


@pytest.mark.parametrize("make", [gym.make, gym.make_vec])
def test_bare_id_is_the_newest_version(make, tiny_pipeline, monkeypatch):
    newest = "DiffusionDenoise-Shapes-Compressibility-v7"
    with pytest.warns(UserWarning, match="Compressibility-v0"):
        env = make("DiffusionDenoise-Shapes-Compressibility", model=str(tiny_pipeline))
    assert env.spec.id == "DiffusionDenoise-Shapes-Compressibility-v0"
    spec = gym.spec(env.spec.id)
    later = gym.envs.registration.EnvSpec(
        newest, spec.entry_point, kwargs=spec.kwargs, vector_entry_point=spec.vector_entry_point
    )
    monkeypatch.setitem(gym.registry, newest, later)
    with pytest.warns(UserWarning, match="Compressibility-v7"):
        assert make("DiffusionDenoise-Shapes-Compressibility", model=str(tiny_pipeline)).spec.id == newest


@pytest.mark.parametrize("make", [gym.make, gym.make_vec])
def test_misspelt_id_gets_gymnasiums_suggestion(make):
    with pytest.raises(gym.error.NameNotFound, match="Did you mean: `DiffusionDenoise-Shapes-Composition`"):
        make("DiffusionDenoise-Shapes-Compositon-v0")


def test_make_gives_the_single_and_make_vec_the_vector_env(tiny_pipeline):
    assert type(gym.make(GENERIC_ID, model=str(tiny_pipeline)).unwrapped) is DenoisingEnv
    env = gym.make_vec(GENERIC_ID, num_envs=3, model=str(tiny_pipeline))
    assert type(env) is DenoisingVectorEnv and isinstance(env, VectorEnv) and env.num_envs == 3


def test_registering_again_changes_nothing(monkeypatch):
    monkeypatch.setattr(gym.spec(GENERIC_ID), "kwargs", {"marked": True})
    before = dict(gym.registry)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register_all()
        gym.register_envs(diffusion_gym)
    assert gym.registry == before and gym.spec(GENERIC_ID).kwargs == {"marked": True}


def test_register_all_fills_in_what_is_missing(monkeypatch):
    missing = "DiffusionDenoise-Shapes-Composition-v0"
    wanted = gym.registry[missing]
    monkeypatch.delitem(gym.registry, missing)
    register_all()
    assert gym.registry[missing] == wanted
