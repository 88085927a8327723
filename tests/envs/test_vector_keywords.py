"""Keywords of the vector environment: what they are by default, where they go, and which are refused."""

import inspect
from dataclasses import fields

import gymnasium as gym
import pytest
import torch
from gymnasium.vector import AutoresetMode

from diffusion_gym.agents.training.env_options import EnvOptions
from diffusion_gym.config import SamplerConfig
from diffusion_gym.envs.vector import DenoisingVectorEnv
from diffusion_gym.models import OPTIONS
from diffusion_gym.testing.random_pipeline import write_random_pipeline

BAD_KEYWORDS = {
    "keyword": ({"guidence_scale": 3.0}, TypeError, "'guidence_scale' is unknown; did you mean 'guidance_scale'"),
    "keyword-own": (
        {"promts": ["a"]},
        TypeError,
        "'promts' is unknown; did you mean 'prompts'.* reward_kwargs, .*, eta",
    ),
    "reward": ({"reward": "Compresibility"}, ValueError, "reward='Compresibility' .* did you mean 'Compressibility'"),
    "reward-5": ({"reward": 5}, ValueError, "reward=5 is neither a name nor a callable; .*Compressibility"),
    "reward-kwargs": ({"reward_kwargs": {"strict": True}}, ValueError, "reward_kwargs=.*strict"),
    "reward-kwargs-name": ({"reward": "Color", "reward_kwargs": {"strikt": True}}, TypeError, "strikt"),
    "prompts": ({"prompts": "comon-animals"}, ValueError, "prompts='comon-animals' .*did you mean 'common-animals'"),
    "prompts-empty": ({"prompts": []}, ValueError, "prompts=.* is empty"),
    "prompts-file": ({"prompts": "missing.txt"}, FileNotFoundError, "prompts='missing.txt'"),
    "model": ({"model": "Shape"}, ValueError, "model='Shape' is unknown; did you mean 'Shapes'.*directory or a hub id"),
    "model-directory": ({"model": "/nowhere/at/all"}, FileNotFoundError, "model='/nowhere/at/all'"),
    "dtype": ({"dtype": "fp16"}, ValueError, "dtype='fp16' must be one of float32, bfloat16, float16"),
    "autoreset_mode": ({"autoreset_mode": "Same"}, ValueError, "autoreset_mode='Same' must be one of .*'SameStep'"),
    "autoreset_mode-none": ({"autoreset_mode": None}, ValueError, "autoreset_mode=None must be one of"),
    "output": ({"output": "jax"}, ValueError, "output='jax' must be one of 'torch', 'numpy'"),
    "render_mode": ({"render_mode": "human"}, ValueError, "render_mode='human' must be one of None, 'rgb_array'"),
    "num_envs": ({"num_envs": 0}, ValueError, "num_envs=0 must be a whole number of at least 1"),
    "num_envs-2.5": ({"num_envs": 2.5}, ValueError, "num_envs=2.5 must be a whole number"),
    "eta": ({"eta": 1.5}, ValueError, r"eta=1.5 must lie in \[0, 1\]"),
    "eta-negative": ({"eta": -0.1}, ValueError, r"eta=-0.1 must lie in \[0, 1\]"),
    "eta-nan": ({"eta": float("nan")}, ValueError, r"eta=nan must lie in \[0, 1\]"),
    "steps": ({"num_inference_steps": 1001}, ValueError, "num_inference_steps=1001 is larger .* at most 999"),
    "steps-0": ({"num_inference_steps": 0}, ValueError, "num_inference_steps=0 must be"),
    "sampler": ({"sampler": "euler"}, ValueError, "sampler='euler' must be one of ddim, ddpm"),
}


@pytest.mark.parametrize(("keywords", "error", "message"), BAD_KEYWORDS.values(), ids=BAD_KEYWORDS)
def test_bad_keyword_is_refused_by_name_value_and_remedy(make_env, keywords, error, message):
    with pytest.raises(error, match=message):
        make_env(**keywords)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none(make_env):
    with pytest.raises(ValueError, match="device='cuda' is not available here; use device='cpu'"):
        make_env(device="cuda")


def test_unknown_device_is_refused(make_env):
    with pytest.raises(ValueError, match="device='gpu'"):
        make_env(device="gpu")


def test_number_of_steps_that_the_error_advises_is_taken(make_env):
    with pytest.raises(ValueError, match="use at most") as caught:
        make_env(1, num_inference_steps=1001)
    most = int(str(caught.value).split()[-1])
    assert make_env(1, num_inference_steps=most).unwrapped.horizon == most


def test_steps_may_be_nearly_as_many_as_the_schedule_has(make_env):
    env = make_env(1, num_inference_steps=999)
    assert env.unwrapped.horizon == len(env.unwrapped.step_table) == 999


def test_cheap_checks_come_before_the_model(make_env):
    with pytest.raises(ValueError, match="eta=2"):
        make_env(model="no-one/has-this", eta=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(("name", "value"), [("device", "cuda"), ("dtype", "fp16"), ("output", "jax")])
def test_they_come_before_any_weights_the_rewards_included(make_env, name, value):
    with pytest.raises(ValueError, match=f"{name}='{value}'"):
        make_env(model="no-one/has-this", reward="Aesthetic", **{name: value})


def test_what_the_command_line_calls_env_is_a_keyword():
    known = inspect.signature(DenoisingVectorEnv.__init__).parameters.keys() | {e.name for e in fields(SamplerConfig)}
    assert {entry.name for entry in fields(EnvOptions)} <= known | set(OPTIONS)


def test_strict_is_the_rewards_keyword(make_env):
    assert make_env(1, model="Shapes", reward="Color", strict=True).unwrapped.reward.strict
    given = {"model": "Shapes", "reward": "Color", "reward_kwargs": {"strict": True}}
    assert make_env(1, strict=True, **given).unwrapped.reward.strict
    with pytest.raises(ValueError, match=r"strict=False contradicts reward_kwargs\['strict'\]=True"):
        make_env(1, strict=False, **given)
    with pytest.raises(TypeError, match="reward='Compressibility': reward_kwargs='strict'"):
        make_env(1, reward="Compressibility", strict=True)


def test_keywords_reach_the_sampler(make_env):
    config = make_env(1, guidance_scale=2.5, eta=0.5).unwrapped.sampler_config
    assert (config.guidance_scale, config.eta, config.num_inference_steps) == (2.5, 0.5, 4)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_autoreset_mode_may_be_its_name_as_a_string(make_env, mode):
    assert make_env(1, autoreset_mode=mode.value).metadata["autoreset_mode"] is mode


def test_default_is_same_step_and_torch(make_env):
    env = make_env(2)
    assert env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert isinstance(env.reset(seed=0)[0]["latents"], torch.Tensor)


def test_envs_of_one_model_share_its_weights(make_env, tmp_path):
    one, other = make_env(1).unwrapped, make_env(2, reward="Compressibility", eta=0.5).unwrapped
    assert one.model is other.model
    assert one.model.unet is other.model.unet
    assert make_env(1, model=str(write_random_pipeline(tmp_path, seed=1))).unwrapped.model is not one.model


def test_model_may_be_an_object(make_env):
    model = make_env(1).unwrapped.model
    assert make_env(2, model=model).unwrapped.model is model


def test_closing_one_env_leaves_another_of_the_same_model(make_env, play):
    one, other = make_env(2, output="numpy"), make_env(2, output="numpy")
    one.reset(seed=0)
    one.close()
    assert len(play(other)) == 5


@pytest.mark.parametrize("reward", ["Location", {"Location": 1.0, "Compressibility": 0.1}])
@pytest.mark.parametrize("limit", [None, 10.0])
def test_a_size_that_the_reward_cannot_judge_is_refused_before_a_picture_is_made(reward, limit):
    with pytest.raises(ValueError, match=r"height=48, width=32 with reward='Location.*': it reads squares of a mul"):
        gym.make_vec(
            "DiffusionDenoise-ShapesFlow-Location-v0", 1, height=48, width=32, reward=reward, reward_seconds=limit
        )
    assert gym.make("DiffusionDenoise-ShapesFlow-Compressibility-v0", height=48, width=32).unwrapped is not None
