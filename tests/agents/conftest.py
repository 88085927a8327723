"""What the agents' tests share."""

from dataclasses import fields

import pytest
import torch

from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.agents.algorithms import DDPOIS
from diffusion_gym.agents.rollout import collect


@pytest.fixture(scope="session")
def make_policy(make_env, perturb):
    """`make_policy(trainable)` on the environment `env`, away from the pretrained model."""

    def make(env=None, trainable="lora", scale=0.05, **keywords):
        torch.manual_seed(0)  # LoRA adapters begin at random values
        policy = DenoisingPolicy.from_env(env if env is not None else make_env(), trainable=trainable, **keywords)
        return perturb(policy, scale)

    return make


@pytest.fixture(scope="session")
def make_agent(make_policy):
    """`make_agent(env, trainable, agent=..., **options)`, with a learning rate that one can see."""

    def make(env=None, trainable="lora", scale=0.05, agent=DDPOIS, **options):
        policy = make_policy(env, trainable, scale)
        defaults = {"learning_rate": 1e-3, "clip_range": 0.2, "normalization": "batch", "micro_batch_size": 64}
        known = {entry.name for entry in fields(agent.Config)}
        chosen = {**{key: value for key, value in defaults.items() if key in known}, **options}
        return agent(policy, agent.Config(trainable=trainable, **chosen))

    return make


@pytest.fixture(scope="session")
def roll():
    """`roll(env, policy, seed)`: one rollout."""

    def rolled(env, policy, seed=0, **keywords):
        return collect(env, policy, torch.Generator().manual_seed(seed), seed=seed, **keywords)

    return rolled
