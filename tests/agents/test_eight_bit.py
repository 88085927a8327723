"""AdamW with moments in 8 bits: where it is refused, and, where bitsandbytes is installed, what it keeps."""

import importlib.util

import pytest
import torch
from torch import nn

from diffusion_gym.agents.algorithms import DDPOIS
from diffusion_gym.agents.optimization import OptimizerOptions, eight_bit_adamw
from diffusion_gym.agents.optimizer_state import optimizer_tensors, restore_optimizer
from diffusion_gym.storage import load_tensors, save_tensors

installed = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
SIZES = (128, 4096 // 32)  # 4,096 values are stored in 8 bits, the 32 of a bias are not


def test_it_is_refused_on_a_cpu_before_anything_is_made(make_env, make_policy):
    policy = make_policy(make_env(), "full")
    with pytest.raises(ValueError, match="optimizer='adamw8bit' needs device='cuda', not 'cpu'; use 'adamw'"):
        DDPOIS(policy, DDPOIS.Config(trainable="full", optimizer="adamw8bit"))


def test_without_the_package_it_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match="optimizer='adamw8bit' needs bitsandbytes .*; pip install bitsandbytes"):
        eight_bit_adamw()


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="optimizer='sgd' must be one of adamw, adamw8bit"):
        OptimizerOptions(optimizer="sgd")


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(SIZES[1], SIZES[0] // 4)


def eight_bit(model):
    return eight_bit_adamw()(list(model.parameters()), lr=1e-2, **OptimizerOptions().adamw)


def train(model, optimizer, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, SIZES[1], generator=generator)).square().sum().backward()
        optimizer.step()


@installed
def test_it_goes_on_bit_for_bit_from_a_file_without_pickle(tmp_path):
    model = network()
    optimizer = eight_bit(model)
    train(model, optimizer, 3, seed=0)
    save_tensors(tmp_path / "adam.safetensors", optimizer_tensors(optimizer))
    copy, forgetful = network(1), network(1)
    for other in (copy, forgetful):
        other.load_state_dict(model.state_dict())
    restored = eight_bit(copy)
    restore_optimizer(restored, load_tensors(tmp_path / "adam.safetensors"))
    for own, its in ((model, optimizer), (copy, restored), (forgetful, eight_bit(forgetful))):
        train(own, its, 2, seed=1)
    assert all(map(torch.equal, model.parameters(), copy.parameters()))
    assert not any(map(torch.equal, model.parameters(), forgetful.parameters()))


@installed
def test_its_moments_take_a_quarter():
    model = nn.Linear(256, 256)
    one, other = eight_bit(model), torch.optim.AdamW(model.parameters())
    for optimizer in (one, other):
        model(torch.ones(1, 256)).sum().backward()
        optimizer.step()
    sizes = [sum(value.nbytes for value in optimizer_tensors(optimizer).values()) for optimizer in (one, other)]
    assert sizes[1] > 2 * 4 * 256**2 and 0.25 < sizes[0] / sizes[1] < 0.28


@installed
@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda state: state.pop("0.absmax1"), "'0.absmax1' is missing"),
        (lambda state: state.update({"0.qmap2": torch.zeros(255)}), r"'0.qmap2' has shape \(255,\)"),
        (lambda state: state.update({"0.absmax2": torch.zeros(3)}), r"'0.absmax2' has shape \(3,\)"),
        (lambda state: state.update({"9.state1": torch.zeros(3)}), "'9.state1' is of none of its 2"),
    ],
)
def test_a_damaged_state_is_refused(damage, message):
    model = network()
    optimizer = eight_bit(model)
    train(model, optimizer, 1, seed=0)
    state = optimizer_tensors(optimizer)
    damage(state)
    with pytest.raises(ValueError, match=message):
        restore_optimizer(optimizer, state)


@installed
def test_the_state_of_the_other_optimizer_is_refused():
    model = network()
    pair = [eight_bit(model), torch.optim.AdamW(model.parameters())]
    for optimizer in pair:
        train(model, optimizer, 1, seed=0)
    for own, other in (pair, pair[::-1]):
        with pytest.raises(ValueError, match=f"not those of {type(own).__name__}; its kind has changed"):
            restore_optimizer(own, optimizer_tensors(other))
    for optimizer in pair:
        restore_optimizer(optimizer, {})
        assert optimizer_tensors(optimizer) == {}


@pytest.mark.gpu
@installed
def test_an_agent_trains_with_it_on_a_gpu(make_env):
    import numpy as np

    from diffusion_gym.agents import DenoisingPolicy

    env = make_env(4, device="cuda", autoreset_mode="Disabled")
    policy = DenoisingPolicy.from_env(env, trainable="full")
    agent = DDPOIS(policy, DDPOIS.Config(trainable="full", optimizer="adamw8bit", batch_size=4, learning_rate=1e-3))
    before = [parameter.detach().clone() for parameter in agent.parameters]
    agent.update(agent.sample(env, 4, (0, 0)), np.random.default_rng(0))
    agent.check_finite(1)
    assert not all(map(torch.equal, before, agent.parameters))
