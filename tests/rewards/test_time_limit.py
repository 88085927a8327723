"""Rewards that exit, hang or are interrupted: one clear error, and the caller goes on or ends as it was asked to."""

import asyncio
import re
import signal
import threading
import time

import gymnasium as gym
import pytest
import torch

from diffusion_gym.rewards import RewardError, RewardOutput, evaluate
from diffusion_gym.rewards.awaiting import awaiting, unanswered
from diffusion_gym.rewards.time_limit import TimeLimited, limited
from diffusion_gym.rewards.weighted import WeightedSum
from diffusion_gym.rewards.worker import abandoned
from waiting import at_once

IMAGES, PROMPTS = torch.rand(2, 3, 4, 4), ["a", "b"]
LONG = 60.0  # seconds, which no call here takes


def brightness(images, prompts, metadata):
    return RewardOutput(images.mean((1, 2, 3)), {"red": images[:, 0].mean((1, 2))})


class Hanging:
    """Hangs until it is let go; then it scores."""

    name = "Hanging"

    def __init__(self):
        self.entered, self.go = threading.Event(), threading.Event()

    def __call__(self, images, prompts, metadata):
        self.entered.set()
        assert self.go.wait(LONG)
        return brightness(images, prompts, metadata)


@pytest.fixture
def hanging():
    reward = Hanging()
    yield reward
    reward.go.set()
    deadline = time.monotonic() + LONG
    while abandoned() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not abandoned()


@pytest.fixture
def handler():
    """`handler(signum, act)` for the length of a test."""
    before = {}

    def install(signum, act):
        before[signum] = signal.signal(signum, act)

    yield install
    for signum, act in before.items():
        signal.signal(signum, act)


# --- exits -----------------------------------------------------------------------------------------------------------

EXITS = [SystemExit(3), SystemExit(), GeneratorExit("x"), asyncio.CancelledError("y"), BaseException("z")]
WAYS = {"in the main thread": lambda reward: reward, "with a limit": lambda reward: TimeLimited(reward, LONG)}


def raising(error):
    def reward(images, prompts, metadata):
        raise error

    return reward


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("error", EXITS, ids=repr)
def test_whatever_a_reward_raises_is_its_error(way, error):
    told = f"{type(error).__name__}: {error}".removesuffix(": ")
    expected = rf"^reward='reward' raised {told} \(test_time_limit\.py:\d+\)$"
    with pytest.raises(RewardError, match=expected):
        evaluate(way(raising(error)), IMAGES, PROMPTS)
    whole = WeightedSum({"reward": (way(raising(error)), 1.0)})
    with pytest.raises(RewardError, match=expected):
        evaluate(whole, IMAGES, PROMPTS)


@pytest.mark.parametrize("limit", [None, LONG])
@pytest.mark.parametrize("ignored", [signal.SIG_IGN, signal.SIG_DFL, lambda signum, frame: None])
def test_a_keyboard_interrupt_of_the_rewards_own_is_its_error(handler, ignored, limit):
    """Where no Ctrl-C can have raised it."""
    handler(signal.SIGINT, ignored)
    with pytest.raises(RewardError, match="reward='reward' raised KeyboardInterrupt"):
        evaluate(limited(raising(KeyboardInterrupt()), limit), IMAGES, PROMPTS)


@pytest.mark.parametrize("limit", [None, LONG])
@pytest.mark.parametrize(
    "signum, act, error",
    [
        (signal.SIGINT, signal.default_int_handler, KeyboardInterrupt),
        (signal.SIGINT, lambda *_: raising(KeyboardInterrupt())(*_, 0), KeyboardInterrupt),
        (signal.SIGTERM, lambda *_: raising(SystemExit(9))(*_, 0), SystemExit),
    ],
    ids=["python's", "ctrl-c", "terminate"],
)
def test_what_a_signal_raises_is_not_the_rewards(handler, hanging, signum, act, error, limit):
    handler(signum, act)

    def send():
        assert hanging.entered.wait(LONG)
        time.sleep(0.5)  # a signal that comes just before the wait begins does not interrupt it
        signal.pthread_kill(threading.main_thread().ident, signum)

    thread = threading.Thread(target=send)
    thread.start()
    with at_once(), pytest.raises(error):
        evaluate(limited(hanging, limit), IMAGES, PROMPTS)
    thread.join()


# --- the limit -------------------------------------------------------------------------------------------------------


def test_a_reward_that_answers_is_as_without_a_limit():
    plain = evaluate(brightness, IMAGES, PROMPTS)
    reward = TimeLimited(brightness, LONG)
    for _ in range(2):
        found = evaluate(reward, IMAGES, PROMPTS)
        assert torch.equal(found.scores, plain.scores) and torch.equal(found.info["red"], plain.info["red"])
    assert reward.name == "brightness" and not reward.background and reward.default_prompts is None


def test_one_thread_calls_it_each_time_and_ends_with_it():
    threads = []

    def reward(images, prompts, metadata):
        threads.append(threading.current_thread())
        assert not torch.is_grad_enabled()
        return images.mean((1, 2, 3))

    timed = TimeLimited(reward, LONG)
    for _ in range(3):
        evaluate(timed, IMAGES, PROMPTS)
    assert len(set(threads)) == 1 and threads[0] is not threading.main_thread()
    del timed
    threads[0].join(LONG)
    assert not threads[0].is_alive()


def test_a_reward_that_hangs_is_an_error_and_a_later_call_may_succeed(hanging):
    reward = TimeLimited(hanging, 0.05)
    told = r"^reward='Hanging': the reward has not returned for [\d.]+ s \(reward_seconds=0\.05\); mend it, or allow"
    with at_once(), pytest.raises(RewardError, match=told):
        evaluate(reward, IMAGES, PROMPTS)
    assert abandoned()
    hanging.go.set()
    reward.seconds = LONG
    assert torch.equal(evaluate(reward, IMAGES, PROMPTS).scores, IMAGES.mean((1, 2, 3)))


def test_a_reward_that_can_give_up_is_asked_to():
    class Cancelled(Hanging):
        def cancel(self):
            self.go.set()

    reward = Cancelled()
    with pytest.raises(RewardError, match="has not returned"):
        evaluate(TimeLimited(reward, 0.05), IMAGES, PROMPTS)
    assert reward.go.is_set() and not abandoned()


def test_what_the_reward_says_of_itself_is_kept():
    class Told:
        name, background, default_prompts = "Told", True, "shapes-color-4"
        cancelled = False

        def __call__(self, images, prompts, metadata):
            return images.mean((1, 2, 3))

        def cancel(self):
            self.cancelled = True

    reward = Told()
    timed = TimeLimited(reward, LONG)
    assert (timed.name, timed.background, timed.default_prompts) == ("Told", True, "shapes-color-4")
    timed.cancel()
    assert reward.cancelled and limited(reward, None) is reward


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), float("inf"), "5", True])
def test_a_limit_out_of_range_is_named(make_env, seconds):
    with pytest.raises(ValueError, match=f"^reward_seconds={re.escape(repr(seconds))} must be a finite number"):
        make_env(reward_seconds=seconds)


@pytest.mark.parametrize("make", [gym.make, gym.make_vec])
def test_the_environment_has_it_as_a_keyword(tiny_pipeline, hanging, make):
    options = {"model": str(tiny_pipeline), "prompts": ["a"], "num_inference_steps": 1}
    env = make("DiffusionDenoise-v0", reward=hanging, reward_seconds=0.05, **options)
    env.reset(seed=0)
    with at_once(), pytest.raises(RewardError, match="reward='Hanging': the reward has not returned"):
        env.step(env.action_space.sample() * 0)


# --- what is waited for ----------------------------------------------------------------------------------------------


def test_nothing_is_waited_for_at_first_and_afterwards():
    assert unanswered(0) is None
    with awaiting("never called"):
        time.sleep(0.01)
        assert re.fullmatch(r"reward='never called' has not answered for \d+ s", unanswered(0))
        assert unanswered(LONG) is None
        with awaiting("inner"):
            assert "never called" in unanswered(0)
        assert "never called" in unanswered(0)
    assert unanswered(0) is None


def test_a_reward_that_has_taken_long_before_is_given_time():
    with awaiting("has taken long"):
        time.sleep(0.2)
    with awaiting("has taken long"):
        assert unanswered(0) is None
    with awaiting("another"):
        assert unanswered(0) is not None


def test_a_thread_waits_by_itself():
    def wait():
        with awaiting("thread's"):
            found.append(unanswered(0))

    found = []
    thread = threading.Thread(target=wait)
    thread.start()
    thread.join()
    assert found == [None]


@pytest.mark.parametrize("limit", [None, LONG])
def test_it_is_known_while_a_reward_is_called(limit):
    main = []

    def reward(images, prompts, metadata):
        main.append(unanswered(0))
        return images.mean((1, 2, 3))

    reward.name = f"noted with {limit}"  # nobody has waited for it before
    evaluate(limited(reward, limit), IMAGES, PROMPTS)
    assert f"reward='noted with {limit}' has not answered" in main[0] and unanswered(0) is None
