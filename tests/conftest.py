"""What the tests share: a tiny random pipeline on disk, and environments on it. No network, no GPU.

One thread, or TEST_THREADS of them.
"""

import os
import warnings

import gymnasium as gym
import pytest
import torch

import diffusion_gym
from diffusion_gym.testing.random_pipeline import write_random_pipeline

pytest.register_assert_rewrite("agent_updates", "scale_out_runs", "trainer_runs")
torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))
gym.register_envs(diffusion_gym)


@pytest.fixture(scope="session", autouse=True)
def data_folder(tmp_path_factory):
    """Where this user's key is, in place of the home folder; also for the processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
        yield


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory):
    """A pipeline directory whose every step is stochastic (`set_alpha_to_one=False`)."""
    return write_random_pipeline(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def exact_end_pipeline(tmp_path_factory):
    """A pipeline directory whose last step is deterministic (`set_alpha_to_one=True`)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers would like every scheduler to be Stable Diffusion's
        return write_random_pipeline(tmp_path_factory.mktemp("models") / "exact-end", set_alpha_to_one=True)


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3))


brightness.differentiable = True


@pytest.fixture(scope="session")
def make_env(tiny_pipeline):
    """`make_env(num_envs, **keywords of gym.make_vec)` on the tiny pipeline, rewarded for brightness."""

    def make(num_envs=4, **keywords):
        defaults = {
            "model": str(tiny_pipeline),
            "reward": brightness,
            "prompts": ["a red circle", "two blue stars", "a green square"],
            "num_inference_steps": 4,
        }
        return gym.make_vec("DiffusionDenoise-v0", num_envs=num_envs, **{**defaults, **keywords})

    return make


@pytest.fixture(scope="session")
def perturb():
    """`perturb(policy, scale)` moves the trainable weights off the pretrained model; LoRA begins at no change."""

    def move(policy, scale=0.05, seed=0):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in policy.trainable_parameters().values():
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
        return policy

    return move
