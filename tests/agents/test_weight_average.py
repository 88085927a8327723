"""The moving average of the weights, against its formula, and in an agent."""

import numpy as np
import pytest
import torch

from diffusion_gym.agents.averaging import WeightAverage
from regression import Problem


def walk(average, parameters, steps=5):
    """Move the parameters about, and return all their values."""
    seen = [[parameter.detach().clone() for parameter in parameters]]
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
        average.update()
        seen.append([parameter.detach().clone() for parameter in parameters])
    return seen


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_the_average_is_a_geometric_sum(decay):
    """decay^n w_0 + (1 - decay) sum_k decay^(n - k) w_k."""
    parameters = list(Problem().net.parameters())
    average = WeightAverage(parameters, decay)
    seen = walk(average, parameters)
    last = len(seen) - 1
    powers = [decay**last, *((1 - decay) * decay ** (last - step) for step in range(1, last + 1))]
    assert sum(powers) == pytest.approx(1)
    for index, found in enumerate(average.average):
        wanted = sum(power * row[index] for power, row in zip(powers, seen, strict=True))
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fails", [False, True])
def test_the_average_stands_in_for_the_weights_for_a_while(fails):
    parameters = list(Problem(dtype=torch.float32).net.parameters())
    average = WeightAverage(parameters, 0.7)
    own = walk(average, parameters)[-1]
    kept = [value.clone() for value in average.average]
    assert not any(map(torch.equal, own, kept))
    try:
        with average.applied():
            assert all(map(torch.equal, parameters, kept))
            if fails:
                raise KeyError("on purpose")
    except KeyError:
        assert fails
    assert all(map(torch.equal, parameters, own))
    assert all(map(torch.equal, average.average, kept))


def test_without_decay_there_is_no_average():
    parameters = list(Problem().net.parameters())
    average = WeightAverage(parameters, 0.0)
    own = walk(average, parameters)[-1]
    assert average.average == []
    with average.applied():
        assert all(map(torch.equal, parameters, own))


@pytest.fixture
def averaging(make_env, make_agent, roll):
    """An agent that averages, and one that does not, after the same three updates; their weights after each."""
    env = make_env(6)
    agents, seen = [], [[] for _ in range(2)]
    for decay, values in zip((0.6, 0.0), seen, strict=True):
        agent = make_agent(env, ema_decay=decay, batch_size=2)
        minimize = agent.minimize

        def noted(*arguments, minimize=minimize, values=values, agent=agent):
            metrics = minimize(*arguments)
            values.append([parameter.detach().clone() for parameter in agent.parameters])
            return metrics

        values.append([parameter.detach().clone() for parameter in agent.parameters])
        agent.minimize = noted
        agent.update(roll(env, agent.policy), np.random.default_rng(0))
        agents.append(agent)
    return (*agents, *seen)


def test_an_agent_averages_over_its_updates(averaging):
    agent, plain_agent, seen, plain_seen = averaging
    assert len(seen) == 4 and all(map(torch.equal, seen[-1], plain_seen[-1]))  # averaging does not touch the training
    wanted = seen[0]
    for values in seen[1:]:
        wanted = [0.6 * old + 0.4 * new for old, new in zip(wanted, values, strict=True)]
    with agent.averaged():
        inside = [parameter.detach().clone() for parameter in agent.policy.trainable_parameters().values()]
    torch.testing.assert_close(inside, wanted, rtol=1e-6, atol=1e-8)
    assert not all(map(torch.equal, inside, seen[-1]))
    assert all(map(torch.equal, agent.parameters, seen[-1]))
    with plain_agent.averaged():
        assert all(map(torch.equal, plain_agent.parameters, plain_seen[-1]))


def test_a_checkpoint_holds_the_average(averaging, make_agent):
    agent, plain_agent, _, _ = averaging
    tensors = {name: value.clone() for name, value in agent.tensors().items()}
    restored = make_agent(ema_decay=0.6, batch_size=2, scale=0.5)
    restored.load_tensors(tensors)
    assert all(map(torch.equal, restored.average.average, agent.average.average))
    assert all(map(torch.equal, restored.parameters, agent.parameters))
    assert not any(name.startswith("average") for name in plain_agent.tensors())
