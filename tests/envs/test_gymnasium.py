"""What Gymnasium offers for any environment: ids without an import, specs as JSON, help, lists, a window."""

import importlib.util
import pydoc
import re
import sys

import gymnasium as gym
import pytest
from gymnasium.envs.registration import EnvSpec

from diffusion_gym.envs.denoising import DenoisingEnv
from diffusion_gym.envs.registration import environment_ids

ID = "DiffusionDenoise-Shapes-Compressibility-v0"


def test_the_module_before_the_id_stands_for_an_import(tiny_pipeline, monkeypatch):
    monkeypatch.delitem(gym.registry, ID)
    monkeypatch.delitem(sys.modules, "diffusion_gym")
    with pytest.raises(gym.error.NameNotFound):
        gym.make(ID)
    assert gym.make(f"diffusion_gym:{ID}", model=str(tiny_pipeline)).spec.id == ID


@pytest.mark.parametrize("id_", environment_ids())
def test_every_spec_survives_json(id_):
    assert EnvSpec.from_json(gym.spec(id_).to_json()) == gym.spec(id_)


@pytest.mark.parametrize("keywords", [{}, {"guidance_scale": 2.0, "prompts": ["a red star"]}])
def test_the_spec_of_a_vector_env_survives_json(tiny_pipeline, keywords):
    made = gym.make_vec(ID, num_envs=2, model=str(tiny_pipeline), **keywords)
    again = gym.make_vec(EnvSpec.from_json(made.spec.to_json()), num_envs=2)
    assert again.sampler_config == made.sampler_config and again.prompt_set.prompts == made.prompt_set.prompts


def test_the_list_of_environments_has_one_section_for_ours():
    text = gym.pprint_registry(disable_print=True)
    section = re.search(r"===== denoising =====\n([^=]*)", text)
    assert set(section[1].split()) >= set(environment_ids())


def test_make_gives_the_environment_itself_which_refuses_steps_before_a_reset(tiny_pipeline):
    env = gym.make(ID, model=str(tiny_pipeline))
    assert type(env) is DenoisingEnv
    with pytest.raises(gym.error.ResetNeeded):
        env.step(env.action_space.sample())


@pytest.mark.parametrize("make", [gym.make, gym.make_vec])
def test_help_is_the_environments_own(tiny_pipeline, make):
    env = make(ID, model=str(tiny_pipeline), num_inference_steps=7, guidance_scale=2.5, prompts=["a red star"])
    text = pydoc.plain(pydoc.render_doc(env))
    model = (env.vector if make is gym.make else env).model
    shape, length = str(model.latent_shape), f"int64 ({model.prompt_length},)"
    wanted = [
        f"latents   float32 {shape}: x_t",
        f"prompt    {length}",
        f"float32 {shape}: x_{{t-1}}",
        "Compressibility",
    ]
    wanted += ["T = 7 steps, guidance scale 2.5", "1 of them, such as 'a red star'", "image, uint8 (8, 8, 3)"]
    assert not [part for part in wanted if part not in text], text


def test_each_model_and_reward_has_its_own_help(tiny_pipeline):
    texts = {
        reward: gym.make_vec("DiffusionDenoise-v0", model=str(tiny_pipeline), reward=reward).__doc__
        for reward in ("Compressibility", "Incompressibility")
    }
    assert all(f"rewarded by {name}." in text for name, text in texts.items())
    assert "JPEG" in texts["Compressibility"]


def test_a_window_is_gymnasiums_or_is_refused_with_the_remedy(tiny_pipeline, monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    with pytest.raises(ValueError, match="render_mode='human' must be one of .*; gym.make with render_mode='human'"):
        gym.make_vec(ID, model=str(tiny_pipeline), render_mode="human")
    with pytest.warns(UserWarning, match="HumanRendering"):
        env = gym.make(ID, model=str(tiny_pipeline), render_mode="human", prompts=["a red star"])
    if importlib.util.find_spec("pygame"):
        env.reset(seed=0)
        env.step(env.action_space.sample())
        env.close()
    else:
        with pytest.raises(gym.error.DependencyNotInstalled, match="pip install"):
            env.reset(seed=0)
