"""What a judge says of pictures: a score of one, or which of two is better; and win rates within a group."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Final, NamedTuple

import torch

from diffusion_gym.rewards.base import RewardOutput

SCORE: Final = (
    'How well does this picture show "{prompt}", and how good does it look? Answer with a number from {lowest} to '
    "{highest}."
)
COMPARE: Final = (
    'Here are two pictures for the text "{prompt}". Which one shows it better and looks better? Answer with 1 for the '
    "first picture, 2 for the second, or 0 if neither is better."
)
_ANSWER: Final = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_NUMBER: Final = re.compile(r"(?<![\w.,])-?\d+(?:\.\d+)?(?!\w)")
_SCORED: Final = re.compile(r"score\W{0,8}(-?\d+(?:\.\d+)?)", re.IGNORECASE)  # "Final Score: 3.5" of UnifiedReward
_NAMED: Final = {"0": 0, "neither": 0, "tie": 0, "equal": 0, "1": 1, "first": 1, "2": 2, "second": 2}
_BETTER: Final = re.compile(
    rf"({'|'.join(_NAMED)})(?:\s+(?:image|picture|one))?\s+is\s+(?:\w+\s+)?better", re.IGNORECASE
)
_WORD: Final = re.compile(rf"(?<![\w.])({'|'.join(_NAMED)})(?![\w]|\.\d)", re.IGNORECASE)


class Scoring:
    """Asks for a number and scores where it lies on the scale, 0 to 1; such as UnifiedReward (arXiv:2503.05236).

    Args:
        question: what is asked, `{prompt}` standing for the prompt, `{lowest}` and `{highest}` for the scale's ends;
            None for `SCORE`.
        scale: the ends.

    Raises:
        ValueError: the question lacks `{prompt}`, or the ends are no scale.
    """

    def __init__(self, question: str | None = None, scale: tuple[float, float] = (0, 10)) -> None:
        self.question = checked_question(question, SCORE)
        try:
            self.lowest, self.highest = map(float, scale)
        except (TypeError, ValueError):
            self.lowest = self.highest = 0.0
        if not self.lowest < self.highest < float("inf"):
            raise ValueError(f"scale={scale!r} must be two numbers, the lower one first, such as (1, 5)")

    def questions(self, prompts: Sequence[str]) -> list[str]:
        """One question a prompt."""
        ends = {"{lowest}": f"{self.lowest:g}", "{highest}": f"{self.highest:g}"}
        asked = self.question
        for name, end in ends.items():
            asked = asked.replace(name, end)
        return [asked.replace("{prompt}", prompt) for prompt in prompts]

    def judge(self, answers: Sequence[str], prompts: Sequence[str], device: torch.device) -> RewardOutput:
        """Scores float32 `(N,)`; `answered` in `info` is the number itself. NaN where there is not one on the scale."""
        found = [parse_score(answer) for answer in answers]
        numbers = [number if number is not None and self.lowest <= number <= self.highest else None for number in found]
        answered = torch.tensor([float("nan") if number is None else number for number in numbers])
        return RewardOutput((answered - self.lowest) / (self.highest - self.lowest), {"answered": answered})


def checked_question(question: str | None, default: str) -> str:
    """The question, or what stands for None.

    Raises:
        ValueError: it lacks `{prompt}`.
    """
    if question is not None and "{prompt}" not in question:
        raise ValueError(f"question={question!r} must hold {{prompt}}, which stands for the prompt")
    return default if question is None else question


def parse_score(answer: str) -> float | None:
    """The number after the last `score`, or the only one; None where there is no such."""
    answer = _final(answer)
    if scored := _SCORED.findall(answer):
        return float(scored[-1])
    numbers = {float(number) for number in _NUMBER.findall(answer)}
    return numbers.pop() if len(numbers) == 1 else None


def parse_verdict(answer: str) -> int | None:
    """1 or 2 for the picture that is better, 0 for neither; None where the answer does not say."""
    answer = _final(answer)
    named = {_NAMED[word.lower()] for word in _BETTER.findall(answer) or _WORD.findall(answer)}
    return named.pop() if len(named) == 1 else None


def _final(answer: str) -> str:
    """What stands in `<answer>`, as UnifiedReward-Think writes it, or all."""
    marked = _ANSWER.findall(answer)
    return str(marked[-1]) if marked else answer


class Pair(NamedTuple):
    """Two pictures to compare, by their places in the batch; the first is shown first."""

    first: int
    second: int


def pairs_within(groups: Sequence[int], *, both_orders: bool) -> list[Pair]:
    """Every pair of a group.

    Args:
        groups: of each picture.
        both_orders: each pair twice, either picture first: judges prefer one place.
    """
    members: dict[int, list[int]] = {}
    for place, group in enumerate(groups):
        members.setdefault(group, []).append(place)
    pick = itertools.permutations if both_orders else itertools.combinations
    return [Pair(*pair) for places in members.values() for pair in pick(places, 2)]


def win_rates(pairs: Sequence[Pair], verdicts: Sequence[int | None], number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How often each picture is the better one, a draw being half a win (Pref-GRPO, arXiv:2508.20751).

    Args:
        pairs: what was compared.
        verdicts: 1 or 2 for the first or second of a pair, 0 for neither, None for no answer, which does not count.
        number: N, of pictures.

    Returns:
        Win rates and numbers of comparisons, float32 `(N,)`; 0.5 for a picture that was never compared.
    """
    wins, compared = torch.zeros(number), torch.zeros(number)
    for (first, second), verdict in zip(pairs, verdicts, strict=True):
        if verdict is None:
            continue
        wins[first] += {0: 0.5, 1: 1.0, 2: 0.0}[verdict]
        wins[second] += {0: 0.5, 1: 0.0, 2: 1.0}[verdict]
        compared[[first, second]] += 1
    return torch.where(compared > 0, wins / compared.clamp(min=1), 0.5), compared
