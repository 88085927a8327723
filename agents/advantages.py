"""From rewards to advantages or weights: by prompt (DDPO, appendix F.3), by group (GRPO), by batch. Pure NumPy."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def batch_normalize(rewards: Floats, std_floor: float = 1e-6) -> Floats:
    """Rewards `(N,)` to zero mean and unit standard deviation over the batch."""
    return (rewards - rewards.mean()) / max(float(rewards.std()), std_floor)


def group_normalize(rewards: Floats, group_size: int, std_floor: float = 1e-6) -> Floats:
    """Rewards `(N,)` to zero mean and unit deviation within each run of `group_size` (GRPO, arXiv:2402.03300).

    Rewards that are not finite stay so and do not count in their group.
    """
    groups = np.where(np.isfinite(rewards), rewards, np.nan).reshape(-1, group_size)
    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a group without any finite reward
        mean, std = np.nanmean(groups, 1, keepdims=True), np.nanstd(groups, 1, keepdims=True)
    return ((groups - mean) / np.maximum(std, std_floor)).reshape(-1)


def softmax_weights(prompts: Sequence[str], rewards: Floats, beta: float) -> Floats:
    """RWR's weights `(N,)`, softmax(beta r) over the samples of each prompt (DDPO, sections C.2 and F.2).

    Rewards that are not finite get weight 0.
    """
    weights = np.zeros(len(rewards))
    for own in _by_prompt(prompts, rewards):
        scaled = beta * (rewards[own] - rewards[own].max())
        weights[own] = np.exp(scaled) / np.exp(scaled).sum()
    return weights


def threshold_weights(prompts: Sequence[str], rewards: Floats, percentile: float) -> Floats:
    """Sparse RWR's weights `(N,)`: 1 where a reward reaches its prompt's `percentile` quantile, else 0.

    Rewards that are not finite get weight 0 (DDPO, sections C.2 and F.2).
    """
    weights = np.zeros(len(rewards))
    for own in _by_prompt(prompts, rewards):
        weights[own] = rewards[own] >= np.quantile(rewards[own], percentile)
    return weights


def _by_prompt(prompts: Sequence[str], rewards: Floats) -> Iterator[NDArray[np.int64]]:
    """Indices of the finite rewards, prompt by prompt."""
    names, usable = np.array(prompts, dtype=object), np.isfinite(rewards)
    for prompt in dict.fromkeys(prompts):
        own = np.flatnonzero((names == prompt) & usable)
        if len(own):
            yield own


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
