"""A GPU is waited for where a reward is due and where metrics are written, nowhere else in an iteration."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from diffusion_gym.agents.algorithms import AGENTS
from diffusion_gym.agents.rollout import collect_many
from host_reads import HostReads

# These read tensors that live on the host: tokens, the steps to train on, and the pairs that were drawn of them.
ON_THE_HOST = {"embeddings.find", "base.transitions", "base.local_on_host", "processes.own"}
ON_THE_HOST |= {"forward_process.noised", "dgpo.minibatches", "reward_gradient.losses", "reward_gradient.begin"}
END_OF_EPISODE = {"vector._require_finite", "base._finite_rows", "rollout.collect"}  # the last for the pictures


def seen_in(work):
    reads = HostReads()
    with reads:
        result = work()
    return result, reads.places - ON_THE_HOST


def test_what_counts_as_a_look_is_found():
    value = torch.ones(2)
    looks = (
        lambda: float(value[0]),
        lambda: bool(value.all()),
        value.tolist,
        value.cpu,
        value.numpy,
        lambda: value[value > 0],
        lambda: value.nonzero(),
    )
    for look in looks:
        assert seen_in(look)[1], look
    assert not seen_in(lambda: (value + 1).sum())[1]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_rollout_is_waited_for_at_the_end_of_its_episodes(make_env, make_policy, guidance):
    env = make_env(3, autoreset_mode=AutoresetMode.DISABLED, guidance_scale=guidance)
    policy = make_policy(env)
    _, places = seen_in(lambda: collect_many(env, policy, 6, (0, 0)))
    assert places == END_OF_EPISODE


@pytest.mark.parametrize(("name", "more"), [*((name, {}) for name in AGENTS.names()), ("ddpo_is", {"renoise": True})])
def test_an_update_is_waited_for_at_its_rewards_and_its_metrics(make_env, make_agent, name, more):
    env = make_env(4, autoreset_mode=AutoresetMode.DISABLED, guidance_scale=3.0)
    fewer = {"updates": 2} if "updates" in {entry.name for entry in fields(AGENTS[name].Config)} else {}
    agent = make_agent(env, agent=AGENTS[name], batch_size=2, **fewer, **more)
    trajectories = agent.sample(env, 4, (0, 0))
    metrics, places = seen_in(lambda: agent.update(trajectories, np.random.default_rng(0)))
    assert metrics["updates"] >= 1
    assert places == {"base.rewards", "metrics.averages"}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["ddpo_is", "rwr"])
def test_cuda_says_the_same(make_env, name):
    """PyTorch's own detector: nothing of an update but rewards and metrics waits for the GPU."""
    from diffusion_gym.agents import DenoisingPolicy

    env = make_env(4, autoreset_mode=AutoresetMode.DISABLED, guidance_scale=3.0, device="cuda")
    policy = DenoisingPolicy.from_env(env)
    agent = AGENTS[name](policy, AGENTS[name].Config(batch_size=4))
    trajectories = agent.sample(env, 4, (0, 0))
    agent.update(trajectories, np.random.default_rng(0))  # what is lazy has happened
    observation, _ = env.reset(seed=0)
    given = {"embedding": policy.embed_prompts(trajectories.prompts)}
    items = agent.transitions(np.arange(4), np.random.default_rng(0)) if name == "ddpo_is" else None
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(env.unwrapped.horizon - 1):
            given["step"] = torch.full((4,), step, device="cuda")
            observation, *_ = env.step(policy.distribution({**observation, **given}).sample())
        if items is not None:
            local = agent.local(items, 4)
            states = trajectories.states(*local.unbind(1))
            policy(states, trajectories.actions(*local.unbind(1))).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
