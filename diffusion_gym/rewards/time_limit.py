"""A limit to the time that one call of a reward may take."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from diffusion_gym.rewards.base import (
    Reward,
    RewardError,
    RewardOutput,
    check_prompt,
    check_size,
    needed_metadata,
    reward_name,
)
from diffusion_gym.rewards.worker import RewardWorker

_POLL: Final = 0.1  # seconds; an answer is not delayed by it


class TimeLimited:
    """A reward whose call ends with an error when it takes too long.

    A thread of its own calls the reward. Nothing can end a call from outside: with the error the thread is left alone
    with it, see `diffusion_gym.rewards.worker.abandoned`; the next call has another one.

    Args:
        reward: the reward.
        seconds: that one call may take.

    Raises:
        ValueError: `seconds` is not positive and finite.
    """

    def __init__(self, reward: Reward, seconds: float) -> None:
        is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
        if not is_number or not (seconds > 0 and math.isfinite(seconds)):
            raise ValueError(f"reward_seconds={seconds!r} must be a finite number above 0; leave it out for no limit")
        self.reward, self.seconds, self.name = reward, seconds, reward_name(reward)
        self.background = bool(getattr(reward, "background", False))
        self.needs_metadata = needed_metadata(reward)
        self.default_prompts: str | None = getattr(reward, "default_prompts", None)
        self._worker: RewardWorker | None = None

    def __call__(
        self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> RewardOutput:
        """Score `images`, float `(N, 3, H, W)` in [0, 1].

        Raises:
            RewardError: the reward failed, or took too long.
        """
        if self._worker is None:
            self._worker = RewardWorker(self.reward)
            weakref.finalize(self, self._worker.close)
        worker, future = self._worker, self._worker.submit(images, prompts, metadata)
        while True:
            try:
                return future.result(_POLL)
            except TimeoutError:  # of this wait: the reward's own is a RewardError
                if (late := worker.late(self.seconds)) is None:
                    continue
                self._abandon()
                told = f"{late}; mend it, or allow more with reward_seconds (--env.reward-seconds)"
                raise RewardError(f"reward={self.name!r}: {told}") from None
            except RewardError:
                raise
            except BaseException:  # of a signal's handler
                self._abandon()
                raise

    def check_prompt(self, prompt: str, metadata: Mapping[str, Any]) -> None:
        """Refuse a prompt that the reward cannot judge."""
        check_prompt(self.reward, prompt, metadata)

    def check_size(self, height: int, width: int) -> None:
        """Refuse a size that the reward cannot judge."""
        check_size(self.reward, height, width)

    def cancel(self) -> None:
        """Have the reward give up, where it can."""
        if callable(cancel := getattr(self.reward, "cancel", None)):
            cancel()

    def _abandon(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()


def limited(reward: Reward, seconds: float | None) -> Reward:
    """`reward`, with a limit to each call where `seconds` is a number."""
    return reward if seconds is None else TimeLimited(reward, seconds)
