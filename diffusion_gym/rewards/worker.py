"""One thread that owns a reward: batches wait in line for it, in a rollout as in the reward server."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Final
from weakref import WeakSet

import torch

from diffusion_gym.images import to_float
from diffusion_gym.rewards.base import Reward, RewardOutput, evaluate

_CLOSED: Final[WeakSet[threading.Thread]] = WeakSet()


def abandoned() -> bool:
    """Whether a reward that was given up is still at it.

    Its thread does not keep the program from ending. But one in the midst of a library's work may have the interpreter
    abort on its way out: such a program ends by `os._exit`, as our commands do.
    """
    return any(thread.is_alive() for thread in _CLOSED)


@dataclass(frozen=True)
class _Job:
    images: torch.Tensor
    prompts: Sequence[str]
    metadata: Sequence[Mapping[str, Any]]
    future: Future[RewardOutput] = field(default_factory=Future)


class RewardWorker:
    """Scores batches in their order, in a thread of its own.

    Args:
        reward: called by this thread only.
        max_batch: batches in line whose pictures have one size are scored together, up to this many pictures; 0 scores
            each batch by itself.
        max_bytes: also up to this many bytes of their pictures; None for any number.
    """

    def __init__(self, reward: Reward, max_batch: int = 0, max_bytes: int | None = None) -> None:
        self.reward, self.max_batch, self.max_bytes = reward, max_batch, max_bytes
        self._since: float | None = None  # when the reward was called
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        # A daemon: a reward that hangs must not keep the program from ending.
        self._thread = threading.Thread(target=self._work, name="reward", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether batches are still scored."""
        return self._thread.is_alive() and not self._closed

    @property
    def waiting(self) -> int:
        """Batches in line."""
        return len(self._jobs)

    @property
    def seconds(self) -> float:
        """How long the reward has been at what it does now; 0 when it has nothing to do."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def late(self, most: float) -> str | None:
        """What to say of a reward that has been at it for more than `most` seconds; None where it has not."""
        seconds = self.seconds
        told = f"the reward has not returned for {round(seconds, 1):g} s (reward_seconds={most:g})"
        return told if seconds > most else None

    def submit(
        self,
        images: torch.Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> Future[RewardOutput]:
        """Put a batch in line; arguments as `evaluate`, and `images` may be uint8 `(N, H, W, 3)`.

        Pictures of 8 bits become float when their turn comes: in line they take a quarter of the memory.

        Returns:
            What `evaluate` will return, or the error that it will raise.

        Raises:
            RuntimeError: the worker is closed.
        """
        job = _Job(images, prompts, [{} for _ in prompts] if metadata is None else metadata)
        with self._changed:
            if self._closed:
                raise RuntimeError("the reward's thread is closed; make another")
            self._jobs.append(job)
            self._changed.notify()
        return job.future

    def withdraw(self, future: Future[RewardOutput]) -> None:
        """Take a batch out of the line; one whose turn has come goes on."""
        with self._changed:
            if future.cancel():
                self._jobs = deque(job for job in self._jobs if job.future is not future)

    def close(self) -> None:
        """Cancel what is in line, ask the reward to give up what it is at, and end the thread.

        A thread whose reward goes on is left alone, see `abandoned`.
        """
        _CLOSED.add(self._thread)  # now, as a signal may end the waiting below
        with self._changed:
            self._closed = True
            for job in self._jobs:
                job.future.cancel()
            self._jobs.clear()
            self._changed.notify()
        cancel, pause = getattr(self.reward, "cancel", None), 0.01
        while self._thread.is_alive() and pause < 1.0:
            if callable(cancel):
                cancel()  # again and again: a call that begins only now may forget what came before it
            self._thread.join(pause)
            pause *= 2

    def _work(self) -> None:
        while self._work_once():
            pass

    def _work_once(self) -> bool:
        """Score what is next; False at the end. Its own function, lest a thread that waits holds the last pictures."""
        jobs = self._next()
        if running := [job for job in jobs if job.future.set_running_or_notify_cancel()]:
            self._score(running)
        return bool(jobs)

    def _next(self) -> list[_Job]:
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            if self._closed:
                return []
            jobs = [self._jobs.popleft()]
            number, size = len(jobs[0].prompts), jobs[0].images.nbytes
            while self._jobs and self._jobs[0].images.shape[1:] == jobs[0].images.shape[1:]:
                number, size = number + len(self._jobs[0].prompts), size + self._jobs[0].images.nbytes
                if number > self.max_batch or (self.max_bytes is not None and size > self.max_bytes):
                    break
                jobs.append(self._jobs.popleft())
        return jobs

    def _score(self, jobs: list[_Job]) -> None:
        self._since = time.monotonic()
        try:
            outputs = _evaluate(self.reward, jobs)
        except BaseException as error:  # whoever waits must hear of it
            if len(jobs) == 1:
                jobs[0].future.set_exception(error)
            else:  # one batch spoils no other
                for job in jobs:
                    self._score([job])
            return
        finally:
            self._since = None
        for job, output in zip(jobs, outputs, strict=True):
            job.future.set_result(output)


def _evaluate(reward: Reward, jobs: list[_Job]) -> list[RewardOutput]:
    """The jobs' scores, from one call of the reward."""
    images = torch.cat([job.images for job in jobs]) if len(jobs) > 1 else jobs[0].images
    if images.dtype == torch.uint8:
        images = to_float(images)
    prompts = [prompt for job in jobs for prompt in job.prompts]
    metadata = [entry for job in jobs for entry in job.metadata]
    # A thread begins with gradients switched on, and on the first GPU.
    with torch.no_grad(), torch.cuda.device_of(images):
        output = evaluate(reward, images, prompts, metadata)
    sizes = [len(job.prompts) for job in jobs]
    parts = {name: value.split(sizes) for name, value in output.info.items()}
    return [
        RewardOutput(scores, {name: part[index] for name, part in parts.items()})
        for index, scores in enumerate(output.scores.split(sizes))
    ]
