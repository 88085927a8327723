"""Updates that float16 gradients overflow in are counted, and an iteration that lost all of them says so."""

import warnings
from dataclasses import fields

import numpy as np
import pytest
import torch

from diffusion_gym.agents.algorithms import AGENTS


@pytest.fixture
def agent_of(make_env, make_agent):
    """`agent_of(name, scale)`: an agent in float16 whose loss scale is `scale`."""

    def made(name, scale):
        env = make_env(4, autoreset_mode="Disabled")
        few = {"updates": 2} if "updates" in {entry.name for entry in fields(AGENTS[name].Config)} else {}
        agent = make_agent(env, agent=AGENTS[name], batch_size=2, mixed_precision="fp16", **few)
        state = agent.optimizer.state()
        agent.optimizer.load_state({**state, "loss_scale": {**state["loss_scale"], "scale": scale}})
        return agent, agent.sample(env, 4, (0, 0))

    return made


def weights(agent):
    return torch.cat([parameter.detach().flatten() for parameter in agent.parameters])


@pytest.mark.parametrize("name", AGENTS.names())
def test_an_iteration_whose_every_update_was_skipped_says_so(agent_of, name):
    agent, trajectories = agent_of(name, 2.0**126)
    before = weights(agent)
    with pytest.warns(RuntimeWarning, match=r"all \d+ updates of the iteration were skipped.*mixed_precision='bf16'"):
        metrics = agent.update(trajectories, np.random.default_rng(0))
    assert metrics["updates_skipped"] == metrics["updates"] >= 1
    assert torch.equal(weights(agent), before)


@pytest.mark.parametrize("name", AGENTS.names())
def test_updates_that_were_taken_are_not_counted(agent_of, name):
    agent, trajectories = agent_of(name, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        metrics = agent.update(trajectories, np.random.default_rng(0))
    assert metrics["updates_skipped"] == 0 < metrics["updates"]


def test_some_of_the_updates_are_counted_alone(agent_of):
    """The scale is halved until the gradient fits."""
    agent, trajectories = agent_of("rwr", 2.0**126)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for seed in range(80):
            found.append(agent.update(trajectories, np.random.default_rng(seed)))
            if found[-1]["updates_skipped"] == 0:
                break
    halvings = round(126 - np.log2(agent.optimizer.state()["loss_scale"]["scale"]))
    assert sum(row["updates_skipped"] for row in found) == halvings > 2
