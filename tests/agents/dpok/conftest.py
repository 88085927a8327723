"""What DPOK's tests share."""

import pytest

from agent_updates import rewarded
from diffusion_gym.agents.algorithms import DPOK
from dpok_options import NUMBER, PLAIN


@pytest.fixture
def env(make_env):
    return make_env(NUMBER)


@pytest.fixture
def make(env, make_agent):
    """`make(**options)`: an agent with the options of `PLAIN` and these."""

    def build(trainable="lora", env=env, scale=0.05, **options):
        return make_agent(env, trainable, scale, agent=DPOK, **{**PLAIN, **options})

    return build


@pytest.fixture
def rolled(env, make, roll):
    """A rollout with rewards of a wide spread."""
    return rewarded(roll(env, make().policy))
