"""The pretrained network beside a full copy: who runs it, and where its weights are meanwhile."""

from dataclasses import fields
from types import SimpleNamespace
from weakref import WeakSet

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from torch import nn

from diffusion_gym.agents import DenoisingPolicy, reference
from diffusion_gym.agents import policy as policy_module
from diffusion_gym.agents.algorithms import AGENTS
from diffusion_gym.agents.benchmark.measures import Evaluator
from diffusion_gym.agents.reference import bring_back, keep_shared, set_aside

DEVICE = torch.device("meta")  # stands for a GPU: a device of its own without memory
NEEDED = {"awm", "ddpo_iskl", "dgpo", "dpok", "nft", "online_dpo"}


@pytest.fixture
def model():
    """A model whose network is still where it was loaded."""
    return SimpleNamespace(unet=nn.Linear(3, 2), device=DEVICE)


def places(network):
    return {parameter.device.type for parameter in network.parameters()}


def test_a_network_that_was_set_aside_comes_back_when_it_is_run(model):
    set_aside(model)
    assert places(model.unet) == {"cpu"}
    assert model.unet(torch.empty(4, 3, device=DEVICE)).device == DEVICE
    assert places(model.unet) == {"meta"} and not model.unet._forward_pre_hooks
    model.unet(torch.empty(4, 3, device=DEVICE))  # and stays


def test_setting_aside_twice_leaves_one_hook_and_coming_back_none(model):
    set_aside(model)
    set_aside(model)
    assert len(model.unet._forward_pre_hooks) == 1
    bring_back(model.unet, DEVICE)
    assert places(model.unet) == {"meta"} and not model.unet._forward_pre_hooks
    bring_back(model.unet, torch.device("cpu"))  # was not aside: nothing moves
    assert places(model.unet) == {"meta"}


def test_weights_that_adapters_share_stay(model):
    keep_shared(model.unet)
    set_aside(model)
    assert not model.unet._forward_pre_hooks


def test_on_a_cpu_nothing_is_moved(model):
    model.device = torch.device("cpu")
    set_aside(model)
    assert not model.unet._forward_pre_hooks


@pytest.mark.parametrize("trainable, number", [("full", 1), ("lora", 0)])
def test_a_policy_of_all_weights_sets_it_aside(make_env, monkeypatch, trainable, number):
    aside = []
    monkeypatch.setattr(policy_module, "set_aside", aside.append)
    monkeypatch.setattr(reference, "_SHARED", WeakSet())  # the network may be that of another test's policy
    env = make_env()
    policy = DenoisingPolicy.from_env(env, trainable=trainable)
    assert aside == [env.unwrapped.model] * number
    policy.set_reference_aside()
    assert len(aside) == 2 * number
    assert (env.unwrapped.model.unet in reference._SHARED) == (trainable == "lora")


def test_a_copy_of_a_network_that_was_set_aside_is_a_whole_one(make_env):
    env = make_env()
    network = env.unwrapped.model.unet
    reference._WAITING[network] = network.register_forward_pre_hook(lambda module, given: None)
    policy = DenoisingPolicy.from_env(env, trainable="full")
    assert not policy.unet._forward_pre_hooks and not network._forward_pre_hooks


@pytest.mark.parametrize("name", AGENTS.names())
def test_only_agents_with_a_penalty_run_it(make_env, make_agent, name):
    env = make_env(4, autoreset_mode=AutoresetMode.DISABLED)
    known = {entry.name for entry in fields(AGENTS[name].Config)}
    fewer = {"updates": 2} if "updates" in known else {}
    agent, calls = make_agent(env, "full", agent=AGENTS[name], batch_size=4, **fewer), []
    agent.check_env(env)
    with env.unwrapped.model.unet.register_forward_pre_hook(lambda module, given: calls.append(len(given[0]))):
        agent.update(agent.sample(env, 4, (0, 0)), np.random.default_rng(0))
    assert bool(calls) == (name in NEEDED)


def test_a_measurement_sets_it_aside_again(make_env, make_policy, monkeypatch):
    env, aside = make_env(4, autoreset_mode=AutoresetMode.DISABLED), []
    policy = make_policy(env, "full")
    monkeypatch.setattr(policy_module, "set_aside", aside.append)
    Evaluator(env, None, 4, 0).measure(policy)
    assert aside == [env.unwrapped.model]


@pytest.mark.gpu
def test_a_gpu_holds_the_weights_once(make_env):
    env = make_env(2, device="cuda", autoreset_mode="Disabled")
    network, before = env.unwrapped.model.unet, torch.cuda.memory_allocated()
    size = sum(part.nbytes for part in network.state_dict().values())
    policy = DenoisingPolicy.from_env(env, trainable="full")
    assert places(network) == {"cpu"} and torch.cuda.memory_allocated() < before + 0.5 * size
    observation, _ = env.reset(seed=0)
    expected = policy.distribution(observation).mean
    assert torch.equal(policy.reference_distribution(observation).mean, expected)
    assert places(network) == {"cuda"} and torch.cuda.memory_allocated() > before + 0.5 * size
