"""From rewards to advantages or weights: by prompt (DDPO, appendix F.3), by group (GRPO), by batch. All in NumPy."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from diffusion_gym.agents.finite import Options, require, require_choice

Floats = NDArray[np.float64]
Normalization = Literal["prompt", "batch", "group", "none"]


class NoUsableReward(RuntimeError):
    """Every reward of an iteration was NaN or infinite: there is nothing to learn from."""


def usable_rewards(rewards: Floats) -> NDArray[np.int64]:
    """Indices of the rewards that are finite.

    Raises:
        NoUsableReward: there is none.
    """
    usable = np.flatnonzero(np.isfinite(rewards))
    if len(usable) == 0:
        raise NoUsableReward(f"all {len(rewards)} rewards of the iteration are NaN or infinite; check the reward")
    return usable


@dataclass(frozen=True)
class AdvantageOptions(Options):
    """How rewards become advantages; the defaults are those of the DDPO paper, appendix F.3."""

    normalization: Normalization = "prompt"
    """What rewards are normalised by to give advantages: each prompt's running statistics, the batch, the group of
    samples that share a prompt (GRPO), or nothing."""
    group_size: int = 1
    """Samples in a row that share a prompt; with `normalization=group`, the group."""
    statistics_buffer: int = 32
    """Rewards kept a prompt for its running statistics."""
    statistics_min_count: int = 16
    """Rewards a prompt needs before its own statistics are used; until then the batch's are."""
    advantage_clip: float = 5.0
    """Advantages are clipped to +- this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "larger than 0", "advantage_clip", "group_size")
        require_choice(self, "normalization", Normalization)
        if self.normalization == "group" and self.group_size < 2:
            raise ValueError(f"normalization='group' needs group_size={self.group_size!r} to be at least 2")


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
    for rows in _by_prompt(prompts, rewards):
        scaled = beta * (rewards[rows] - rewards[rows].max())
        weights[rows] = np.exp(scaled) / np.exp(scaled).sum()
    return weights


def threshold_weights(prompts: Sequence[str], rewards: Floats, percentile: float) -> Floats:
    """Sparse RWR's weights `(N,)`: 1 where a reward reaches its prompt's `percentile` quantile, else 0.

    Rewards that are not finite get weight 0 (DDPO, sections C.2 and F.2).
    """
    weights = np.zeros(len(rewards))
    for rows in _by_prompt(prompts, rewards):
        weights[rows] = rewards[rows] >= np.quantile(rewards[rows], percentile)
    return weights


def _by_prompt(prompts: Sequence[str], rewards: Floats) -> Iterator[NDArray[np.int64]]:
    """Indices of the finite rewards, prompt by prompt."""
    names, usable = np.array(prompts, dtype=object), np.isfinite(rewards)
    for prompt in dict.fromkeys(prompts):
        rows = np.flatnonzero((names == prompt) & usable)
        if len(rows):
            yield rows


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

    def __init__(
        self,
        buffer_size: int = AdvantageOptions.statistics_buffer,
        min_count: int = AdvantageOptions.statistics_min_count,
        std_floor: float = 1e-6,
    ) -> None:
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
            rows = np.array([entry == prompt for entry in prompts])
            buffer = np.array(self._rewards[prompt])
            centre, spread = (mean, std) if len(buffer) < self.min_count else (buffer.mean(), buffer.std())
            advantages[rows] = (rewards[rows] - centre) / max(float(spread), self.std_floor)
        return advantages

    def state(self) -> dict[str, list[float]]:
        """The buffers, for a checkpoint."""
        return {prompt: list(rewards) for prompt, rewards in self._rewards.items()}

    def load(self, state: Mapping[str, Sequence[float]]) -> None:
        """Put back what `state` gave."""
        self._rewards = {prompt: deque(rewards, maxlen=self.buffer_size) for prompt, rewards in state.items()}


class RewardNormalizer:
    """Makes advantages of the rewards of one iteration after another.

    Args:
        options: how.

    Attributes:
        statistics: of the prompts; part of a checkpoint.

    Raises:
        ValueError: `statistics_min_count` is larger than `statistics_buffer`.
    """

    def __init__(self, options: AdvantageOptions) -> None:
        self.options = options
        self.statistics = PromptStatistics(options.statistics_buffer, options.statistics_min_count)

    def normalize(self, prompts: Sequence[str], rewards: Floats) -> Floats:
        """Normalised rewards `(N,)` of N samples with their prompts; NaN where a reward is not finite.

        Raises:
            NoUsableReward: no reward is finite.
        """
        usable = usable_rewards(rewards)
        if self.options.normalization == "group":
            return group_normalize(rewards, self.options.group_size)
        finite, normalized = rewards[usable], np.full(len(rewards), np.nan)
        if self.options.normalization == "prompt":
            finite = self.statistics.normalize([prompts[index] for index in usable], finite)
        elif self.options.normalization == "batch":
            finite = batch_normalize(finite)
        normalized[usable] = finite
        return normalized

    def clip(self, advantages: Floats) -> Floats:
        """Advantages within +- `advantage_clip`."""
        return np.clip(advantages, -self.options.advantage_clip, self.options.advantage_clip)
