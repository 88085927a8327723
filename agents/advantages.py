"""From rewards to advantages: normalisation by prompt (DDPO, appendix F.3) or by batch. Pure NumPy."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def batch_normalize(rewards: Floats, std_floor: float = 1e-6) -> Floats:
    """Rewards `(N,)` to zero mean and unit standard deviation over the batch."""
    return (rewards - rewards.mean()) / max(float(rewards.std()), std_floor)


class PromptStatistics:
    """Running mean and standard deviation of the reward, for each prompt on its own.

    A prompt with fewer than `min_count` rewards in its buffer is normalised by the batch instead.

    Args:
        buffer_size: rewards kept a prompt.
        min_count: rewards needed before a prompt's own statistics are used.
        std_floor: floor of the standard deviation, so that equal rewards give 0 and not NaN.

    Raises:
        ValueError: `min_count` is larger than `buffer_size`, so that it could never be reached.
    """

    def __init__(self, buffer_size: int = 32, min_count: int = 16, std_floor: float = 1e-6) -> None:
        if not 1 <= min_count <= buffer_size:
            raise ValueError(f"min_count={min_count} must lie between 1 and buffer_size={buffer_size}")
        self.buffer_size, self.min_count, self.std_floor = buffer_size, min_count, std_floor
        self._rewards: dict[str, deque[float]] = {}

    def normalize(self, prompts: Sequence[str], rewards: Floats) -> Floats:
        """Take `rewards` `(N,)` into the statistics and return the advantages `(N,)`."""
        for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
            self._rewards.setdefault(prompt, deque(maxlen=self.buffer_size)).append(reward)
        mean, std = rewards.mean(), rewards.std()
        advantages = np.empty(len(rewards))
        for prompt in set(prompts):
            own = np.array([entry == prompt for entry in prompts])
            kept = np.array(self._rewards[prompt])
            centre, spread = (mean, std) if len(kept) < self.min_count else (kept.mean(), kept.std())
            advantages[own] = (rewards[own] - centre) / max(float(spread), self.std_floor)
        return advantages

    def state(self) -> dict[str, list[float]]:
        """The buffers, for a checkpoint."""
        return {prompt: list(rewards) for prompt, rewards in self._rewards.items()}

    def load(self, state: Mapping[str, Sequence[float]]) -> None:
        """Put back what `state` gave."""
        self._rewards = {prompt: deque(rewards, maxlen=self.buffer_size) for prompt, rewards in state.items()}
