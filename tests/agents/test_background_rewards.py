"""Rewards computed while the next batch is sampled: order of events, equal bits, and clean ends."""

import threading
from dataclasses import fields

import pytest
import torch

from diffusion_gym.agents import rollout
from diffusion_gym.agents.embeddings import TextEmbeddings
from diffusion_gym.agents.rollout import Trajectories, collect_many
from diffusion_gym.rewards import RewardError, RewardOutput
from diffusion_gym.wrappers import KLPenaltyVectorEnv, OneStepVectorEnv

BATCH = 3


class Background:
    """Brightness and redness; `before(call)` runs in the reward's thread before each call is answered."""

    background = True

    def __init__(self, before=lambda call: None, background=True):
        self.before, self.calls, self.background = before, 0, background
        self.threads, self.cancelled = set(), threading.Event()

    def __call__(self, images, prompts, metadata):
        self.calls += 1
        self.threads.add(threading.current_thread())
        self.before(self.calls)
        return RewardOutput(images.mean((1, 2, 3)), {"red": images[:, 0].mean((1, 2))})

    def cancel(self):
        self.cancelled.set()


class Watched:
    """Counts the batches that a vector environment has begun; `reached(n)` waits for the n-th."""

    def __init__(self, env):
        self.begun, self._changed, self._reset = 0, threading.Condition(), env.reset
        env.reset = self.reset
        self.on_reset = lambda number: None

    def reset(self, **keywords):
        with self._changed:
            self.begun += 1
            self._changed.notify_all()
        self.on_reset(self.begun)
        return self._reset(**keywords)

    def reached(self, number):
        with self._changed:
            assert self._changed.wait_for(lambda: self.begun >= number, timeout=60)


def the_thread_is_gone(reward):
    """Whether the threads that called `reward` have ended; other tests' may live until their garbage is collected."""
    return reward.threads and not any(thread.is_alive() for thread in reward.threads)


def differing(first, second):
    """The fields in which two rollouts differ in a bit."""
    found = []
    for entry in fields(Trajectories):
        one, other = getattr(first, entry.name), getattr(second, entry.name)
        one, other = ((own.all() if isinstance(own, TextEmbeddings) else own) for own in (one, other))
        pairs = [(one[key], other[key]) for key in one] if isinstance(one, dict) else [(one, other)]
        for a, b in pairs:
            same = torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b
            if not same:
                found.append(entry.name)
    return found


@pytest.fixture
def make(make_env):
    def build(reward, **keywords):
        return make_env(BATCH, reward=reward, num_inference_steps=2, autoreset_mode="Disabled", **keywords)

    return build


@pytest.mark.parametrize("view", [lambda env: env, OneStepVectorEnv], ids=["steps", "one step"])
def test_the_next_batch_is_sampled_while_the_reward_is_computed(make, make_policy, view):
    """The reward of a batch is not answered before the next one has begun: one after the other, it would never be."""
    reward = Background(lambda call: watched.reached(min(call + 1, 4)))
    env = make(reward)
    watched = Watched(env)
    rolled = collect_many(view(env), make_policy(env), 4 * BATCH, (0,))
    assert reward.calls == watched.begun == 4
    assert threading.main_thread() not in reward.threads
    assert len(rolled.rewards) == 4 * BATCH and (rolled.rewards > 0).all()
    assert the_thread_is_gone(reward)


@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("output", ["torch", "numpy"])
@pytest.mark.parametrize("view", [lambda env: env, OneStepVectorEnv], ids=["steps", "one step"])
def test_bits_are_those_of_one_after_the_other(make, make_policy, view, output, group_size):
    policy = make_policy(make(Background()))
    at_once, deferred = (
        collect_many(view(make(reward, output=output)), policy, 5 * BATCH, (7, 1), group_size=group_size)
        for reward in (Background(background=False), Background())
    )
    assert not differing(at_once, deferred)
    assert deferred.components.keys() == {"red"}


def test_few_batches_wait_for_their_rewards(make, make_policy, monkeypatch):
    monkeypatch.setattr(rollout, "_IN_FLIGHT", 2)
    begun = []

    def slow(call):
        watched.reached(min(call + 2, 6))  # as many as may wait
        begun.append(watched.begun)

    env = make(Background(slow))
    watched = Watched(env)
    collect_many(env, make_policy(env), 6 * BATCH, (0,))
    assert all(number <= call + 2 for call, number in enumerate(begun, 1))


def test_an_error_ends_the_rollout(make, make_policy, monkeypatch):
    monkeypatch.setattr(rollout, "_IN_FLIGHT", 1)

    def fail(call):
        if call == 2:
            raise OSError("the server is gone")

    reward = Background(fail)
    env = make(reward)
    watched = Watched(env)
    with pytest.raises(RewardError, match="raised OSError: the server is gone"):
        collect_many(env, make_policy(env), 50 * BATCH, (0,))
    assert watched.begun <= 3
    assert the_thread_is_gone(reward)
    collect_many(env, make_policy(env), BATCH, (0,))  # and the environment goes on


def test_ctrl_c_leaves_no_thread(make, make_policy):
    """While the reward waits for its server, and a second batch is being sampled."""
    reward = Background(lambda call: reward.cancelled.wait(60))
    env = make(reward)
    watched = Watched(env)

    def interrupt(number):
        if number == 2:
            raise KeyboardInterrupt

    watched.on_reset = interrupt
    with pytest.raises(KeyboardInterrupt):
        collect_many(env, make_policy(env), 4 * BATCH, (0,))
    assert reward.cancelled.is_set() and the_thread_is_gone(reward)


def test_wrappers_that_want_the_reward_get_it_with_the_last_step(make, make_policy):
    reward, plain = Background(), Background(background=False)
    policy = make_policy(make(plain))
    wrapped = [KLPenaltyVectorEnv(make(kind), policy, 0.1) for kind in (reward, plain)]
    assert not differing(*(collect_many(env, policy, 2 * BATCH, (0,)) for env in wrapped))
    assert reward.threads == {threading.main_thread()}


def test_rewards_that_are_not_of_the_background_stay_in_the_main_thread(make, make_policy):
    reward = Background(background=False)
    env = make(reward)
    collect_many(env, make_policy(env), 2 * BATCH, (0,))
    assert reward.threads == {threading.main_thread()}


def test_a_rollout_of_another_autoreset_mode_is_not_deferred(make_env, make_policy):
    reward = Background()
    env = make_env(BATCH, reward=reward, num_inference_steps=2)
    collect_many(env, make_policy(env), 2 * BATCH, (0,))
    assert reward.threads == {threading.main_thread()}
