"""What the wrappers' tests share."""

import copy
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch

from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.envs.denoising import DenoisingEnv

SHAPE = (4, 4, 4)


class Toy:
    """A policy without a network, N(0.9 x, 0.5^2) against N(0.7 x, 0.5^2), that foresees x_0 = x / 2."""

    def __init__(self):
        self.calls, self.rows = 0, 0

    def _gaussian(self, observation, weight):
        latents = torch.as_tensor(observation["latents"])
        return SimpleNamespace(mean=weight * latents, std=torch.full((len(latents), 1, 1, 1), 0.5))

    def distribution(self, observation):
        self.calls += 1
        self.rows += len(observation["latents"])
        return self._gaussian(observation, 0.9)

    def reference_distribution(self, observation):
        return self._gaussian(observation, 0.7)

    def denoised(self, observation):
        return torch.as_tensor(observation["latents"]) / 2


@pytest.fixture
def toy():
    return Toy()


@pytest.fixture
def actions():
    """`actions(step, number)`: x_{t-1} for a step of N environments, float32 NumPy."""

    def make(step, number=3):
        return np.random.default_rng(step).standard_normal((number, *SHAPE), dtype=np.float32)

    return make


@pytest.fixture
def make_single(tiny_pipeline):
    """`make_single(**keywords of gym.make)`, the tiny pipeline with T = 4."""

    def make(**keywords):
        defaults = {"model": str(tiny_pipeline), "num_inference_steps": 4, "prompts": "shapes-location"}
        return gym.make("DiffusionDenoise-v0", **{**defaults, **keywords})

    return make


@pytest.fixture
def make_bare(tiny_pipeline):
    """`make_bare()`, a single environment without a spec: Gymnasium cannot make wrappers around a policy again."""
    return lambda: DenoisingEnv(model=str(tiny_pipeline), num_inference_steps=4, prompts="shapes-location")


@pytest.fixture
def moved_policy(perturb):
    """`moved_policy(env)`, a `DenoisingPolicy` off the pretrained model."""
    return lambda env: perturb(DenoisingPolicy.from_env(env, trainable="full"))


@pytest.fixture
def play(actions):
    """`play(env, steps, seed, after)`: what a reset and `steps` steps return, as NumPy; `after` is called after the
    first step, and what it returns stands in the list too."""

    def numpy(value):
        if isinstance(value, dict):
            return {key: numpy(part) for key, part in value.items()}
        return value.cpu().numpy().copy() if isinstance(value, torch.Tensor) else copy.deepcopy(value)

    def named(results):
        names = ("observation", "rewards", "terminations", "truncations", "infos")
        chosen = (names[0], names[-1]) if len(results) == 2 else names
        return SimpleNamespace(**{name: numpy(part) for name, part in zip(chosen, results, strict=True)})

    def run(env, steps, seed=0, after=None):
        played = [named(env.reset(seed=seed))]
        for step in range(steps):
            action = actions(step, env.num_envs)
            torch_wanted = env.unwrapped.output == "torch"
            played.append(named(env.step(torch.from_numpy(action) if torch_wanted else action)))
            if step == 0 and after is not None:
                played.append(named(after(env)))
        return played

    return run
