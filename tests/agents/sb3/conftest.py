"""What the tests of the SB3 adapter share."""

import gymnasium as gym
import numpy as np
import pytest
import torch

T = 3


@pytest.fixture
def make_single(make_env):
    """`make_single(**keywords)`: a single environment with the settings of `make_env(..., num_inference_steps=T)`."""
    keywords = make_env(1, num_inference_steps=T).spec.kwargs
    keywords = {key: keywords[key] for key in ("model", "reward", "prompts", "num_inference_steps")}
    return lambda **more: gym.make("DiffusionDenoise-v0", **{**keywords, **more})


@pytest.fixture(scope="session")
def same():
    """`same(one, other)`: observations are equal, in type too."""

    def check(one, other):
        assert one.keys() == other.keys()
        for key in one:
            assert one[key].dtype == other[key].dtype, key
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)

    return check


@pytest.fixture(scope="session")
def observed():
    """`observed(env, seed)`: states at different steps of different episodes."""

    def observe(env, seed=0):
        observation = env.reset(seed=seed)[0]
        table = env.unwrapped.step_table.timesteps
        return {**observation, "timestep": table[torch.arange(len(observation["latents"])) % len(table)][:, None]}

    return observe


@pytest.fixture(scope="session")
def ddpo():
    """`ddpo(env, **options)`: a seeded `DDPOPPO`."""
    from diffusion_gym.agents.sb3 import DDPOPPO

    return lambda env, **options: DDPOPPO("CFGUNetPolicy", env, **{"seed": 0, **options})


@pytest.fixture(scope="session")
def rolled():
    """`rolled(model)`: the buffer after `model` has collected one rollout."""

    def roll(model):
        _, callback = model._setup_learn(model.n_steps * model.n_envs, None)
        assert model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
        return model.rollout_buffer

    return roll
