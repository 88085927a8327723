"""The thread that owns a reward: order, merging, errors and its end."""

import threading
import time
import weakref
from concurrent.futures import CancelledError

import pytest
import torch

from diffusion_gym.rewards import RewardError, RewardOutput
from diffusion_gym.rewards.worker import RewardWorker


class Gated:
    """Brightness; each call waits for the gate, and notes its prompts and its thread."""

    name = "Gated"

    def __init__(self):
        self.gate, self.calls, self.threads, self.cancelled = threading.Event(), [], set(), False
        self.entered = threading.Event()

    def __call__(self, images, prompts, metadata):
        self.entered.set()
        assert self.gate.wait(30)
        assert not torch.is_grad_enabled()
        self.calls.append(list(prompts))
        self.threads.add(threading.current_thread().name)
        if "exit" in prompts:
            raise SystemExit(3)
        if "raise" in prompts:
            raise ValueError("not this one")
        return RewardOutput(images.mean((1, 2, 3)), {"red": images[:, 0].mean((1, 2))})

    def cancel(self):
        self.cancelled = True
        self.gate.set()


@pytest.fixture
def reward():
    return Gated()


@pytest.fixture
def start(reward):
    workers = []

    def begin(max_batch=0):
        """A worker that is at a batch "first", with the gate closed."""
        workers.append(RewardWorker(reward, max_batch))
        first = workers[-1].submit(images(1, 0), ["first"])
        assert reward.entered.wait(30)
        return workers[-1], first

    yield begin
    for worker in workers:
        worker.close()


def images(number, seed, size=4):
    return torch.rand(number, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_each_batch_by_itself_and_in_order(start, reward):
    worker, first = start()
    futures = [first] + [worker.submit(images(2, seed), [f"{seed}", f"{seed}'"]) for seed in (1, 2, 3)]
    reward.gate.set()
    outputs = [future.result(30) for future in futures]
    assert reward.calls == [["first"], ["1", "1'"], ["2", "2'"], ["3", "3'"]]
    assert reward.threads == {"reward"}
    for seed, output in enumerate(outputs[1:], 1):
        assert torch.equal(output.scores, images(2, seed).mean((1, 2, 3)))
        assert torch.equal(output.info["red"], images(2, seed)[:, 0].mean((1, 2)))


def test_waiting_batches_of_one_size_are_merged_up_to_the_largest(start, reward):
    worker, _ = start(max_batch=4)
    sizes = [(1, 4), (2, 4), (2, 4), (1, 8), (1, 4), (6, 4)]
    futures = []
    for seed, (number, size) in enumerate(sizes):
        futures.append(worker.submit(images(number, seed, size), [str(seed)] * number))
    reward.gate.set()
    outputs = [future.result(30) for future in futures]
    assert reward.calls == [["first"], ["0", "1", "1"], ["2", "2"], ["3"], ["4"], ["5"] * 6]
    for seed, (number, size) in enumerate(sizes):
        torch.testing.assert_close(outputs[seed].scores, images(number, seed, size).mean((1, 2, 3)))
        torch.testing.assert_close(outputs[seed].info["red"], images(number, seed, size)[:, 0].mean((1, 2)))


@pytest.mark.parametrize(("prompt", "error"), [("raise", "ValueError: not this one"), ("exit", "SystemExit")])
def test_an_error_reaches_its_own_batch_only(start, reward, prompt, error):
    worker, _ = start(max_batch=8)
    bad, good = worker.submit(images(1, 1), [prompt]), worker.submit(images(1, 2), ["good"])
    reward.gate.set()
    with pytest.raises(RewardError, match=f"reward='Gated' raised {error}"):
        bad.result(30)
    assert torch.equal(good.result(30).scores, images(1, 2).mean((1, 2, 3)))
    assert worker.alive


def test_closing_cancels_what_waits_and_what_runs(start, reward):
    worker, first = start()
    second = worker.submit(images(1, 1), ["second"])
    worker.close()
    assert reward.cancelled and not worker.alive
    with pytest.raises(CancelledError):
        second.result(30)
    assert first.result(30).scores.shape == (1,)
    assert reward.calls == [["first"]]
    with pytest.raises(RuntimeError, match="closed"):
        worker.submit(images(1, 2), ["third"])


def test_closing_reaches_a_call_that_begins_only_then_and_forgets_what_came_before():
    entered, first, cancelled = threading.Event(), threading.Event(), threading.Event()

    class Forgetful:
        def __call__(self, images, prompts, metadata):
            entered.set()
            assert first.wait(30)  # `cancel` comes just before the call's first line, as it were
            cancelled.clear()
            assert cancelled.wait(30)
            raise RuntimeError("given up")

        def cancel(self):
            cancelled.set()
            first.set()

    worker = RewardWorker(Forgetful())
    future = worker.submit(images(1, 0), ["first"])
    assert entered.wait(30)
    worker.close()
    with pytest.raises(RewardError, match="given up"):
        future.result(1.5)


def test_a_cancelled_batch_is_not_scored(start, reward):
    worker, _ = start()
    second, third = (worker.submit(images(1, seed), [str(seed)]) for seed in (1, 2))
    assert second.cancel()
    reward.gate.set()
    third.result(30)
    assert reward.calls == [["first"], ["2"]]


def test_a_batch_that_is_withdrawn_leaves_the_line(start, reward):
    worker, first = start()
    second, third = (worker.submit(images(1, seed), [str(seed)]) for seed in (1, 2))
    worker.withdraw(second)
    assert second.cancelled() and worker.waiting == 1
    worker.withdraw(first)  # its turn has come
    reward.gate.set()
    assert first.result(30) and third.result(30)
    assert reward.calls == [["first"], ["2"]]


def test_waiting_batches_are_merged_up_to_the_most_bytes(reward):
    worker = RewardWorker(reward, max_batch=8, max_bytes=2 * 3 * 4 * 4)
    pictures = [torch.full((1, 4, 4, 3), 51 * seed, dtype=torch.uint8) for seed in range(4)]
    first = worker.submit(pictures[0], ["first"])
    assert reward.entered.wait(30)
    futures = [worker.submit(picture, [str(seed)]) for seed, picture in enumerate(pictures)]
    reward.gate.set()
    scores = [future.result(30).scores.item() for future in futures]
    worker.close()
    assert scores == pytest.approx([0, 0.2, 0.4, 0.6]) and first.done()  # pictures of 8 bits are scored as float
    assert reward.calls == [["first"], ["0", "1"], ["2", "3"]]


def test_it_says_how_long_the_reward_has_been_at_it(start, reward):
    worker, first = start()
    while worker.seconds < 0.05:
        assert not first.done()
    reward.gate.set()
    first.result(30)
    deadline = time.monotonic() + 30
    while worker.seconds and time.monotonic() < deadline:
        pass
    assert worker.seconds == 0


def test_a_thread_that_waits_holds_no_pictures(start, reward):
    worker, first = start()
    given = images(1, 1)
    gone = weakref.ref(given)
    second = worker.submit(given, ["second"])
    del given
    reward.gate.set()
    second.result(30)
    deadline = time.monotonic() + 30
    while gone() is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert gone() is None
