"""Spans and timelines: exclusive seconds by a fake clock, threads, and nothing at all when nobody asks."""

import threading

import pytest
import torch

from diffusion_gym.timing import OTHER, HostClock, Phase, clock_of, span, timed


class FakeClock:
    """Its time is what a test says."""

    def __init__(self):
        self.now = 0.0

    def mark(self):
        return self.now

    def seconds(self, marks):
        return [after - before for before, after in zip(marks, marks[1:], strict=False)]


@pytest.fixture
def clock():
    return FakeClock()


def test_time_is_that_of_the_innermost_span(clock):
    with timed(clock) as timeline:
        clock.now += 1  # other
        with span("train"):
            clock.now += 10
            with span("wait"):
                clock.now += 100
                with span("train"):
                    clock.now += 1000
            clock.now += 20
        clock.now += 2  # other
        with span("wait"):
            clock.now += 200
    clock.now += 5000  # after the end
    assert timeline.phases() == {OTHER: Phase(3, 0), "train": Phase(1030, 2), "wait": Phase(300, 2)}


def test_a_whole_span_takes_the_time_of_those_inside(clock):
    with timed(clock) as timeline:
        with span("pictures", whole=True):
            clock.now += 1
            with span("rollout"):
                clock.now += 10
            clock.now += 100
        with span("rollout"):
            clock.now += 1000
    assert timeline.phases() == {OTHER: Phase(0, 0), "pictures": Phase(111, 1), "rollout": Phase(1000, 1)}


def test_a_span_that_fails_ends(clock):
    with timed(clock) as timeline:
        with pytest.raises(KeyError), span("a"):
            clock.now += 1
            raise KeyError
        clock.now += 10
    assert timeline.phases() == {OTHER: Phase(10, 0), "a": Phase(1, 1)}


def test_a_timeline_that_fails_ends(clock):
    with pytest.raises(KeyError), timed(clock):
        raise KeyError
    with timed(clock) as timeline, span("a"):
        clock.now += 1
    assert timeline.phases()["a"] == Phase(1, 1)


def test_the_watcher_is_told_of_each_span_and_its_time_is_nobodys(clock):
    told = []

    def watch(*about):
        told.append(about)
        clock.now += 1000

    with timed(clock, watch) as timeline:
        clock.now += 1
        with span("a"):
            clock.now += 10
            with span("b", whole=True):
                clock.now += 100
        with span("a"):
            clock.now += 20
    assert told == [("a", 0, False), ("b", 0, True), ("a", 1, False)]
    assert timeline.phases() == {OTHER: Phase(1, 0), "a": Phase(30, 2), "b": Phase(100, 1)}


def test_nothing_is_recorded_when_nobody_asks(clock, monkeypatch):
    monkeypatch.setattr(torch.profiler, "record_function", lambda name: pytest.fail("recorded"))
    with span("a"), span("b", whole=True):
        pass
    with timed(clock) as timeline:  # without a watcher there is no trace to label
        pass
    with timed(clock), span("a"):
        pass
    with span("a"):
        clock.now += 1
    assert timeline.phases() == {OTHER: Phase(0, 0)}


def test_other_threads_are_not_timed(clock):
    def work():
        with span("reward"):
            clock.now += 10

    with timed(clock) as timeline, span("wait"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert timeline.phases() == {OTHER: Phase(0, 0), "wait": Phase(10, 1)}


def test_one_timeline_a_thread(clock):
    with timed(clock), pytest.raises(RuntimeError, match="this thread is being timed already; end that first"):
        with timed(clock):
            pass


def test_the_host_clock_moves_on():
    clock = clock_of(torch.device("cpu"))
    assert isinstance(clock, HostClock)
    first, second = clock.seconds([clock.mark(), clock.mark(), clock.mark()])
    assert first >= 0 and second >= 0


@pytest.mark.gpu
def test_the_seconds_of_a_gpu_are_its_own_and_nothing_waits_for_it():
    """Queued work counts where it was queued, although the host is past it; CUDA's elapsed time is the reference."""
    device = torch.device("cuda")
    clock = clock_of(device)
    a = torch.randn(4096, 4096, device=device)
    a @ a  # cuBLAS is loaded
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.set_sync_debug_mode("error")
    try:
        with timed(clock) as timeline:
            with span("long"):
                begin.record()
                for _ in range(50):
                    a @ a
                end.record()
            with span("short"):
                a + a
    finally:
        torch.cuda.set_sync_debug_mode("default")
    phases = timeline.phases()
    assert phases["long"].seconds == pytest.approx(begin.elapsed_time(end) / 1000, rel=0.05)
    assert phases["short"].seconds < phases["long"].seconds / 5
    with timed(clock) as timeline, span("again"):  # with the events of before
        a @ a
    assert 0 < timeline.phases()["again"].seconds < phases["long"].seconds
