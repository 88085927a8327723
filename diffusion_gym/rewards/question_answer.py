"""Prompts "n animals" judged by a question: does the picture show n? (DDPO paper, appendix E.2)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

import torch

from diffusion_gym.english import NUMBERS, plural
from diffusion_gym.rewards.base import RewardOutput

QUESTION: Final = "How many {things} are there in this image? Answer with a number."

_TEENS: Final = "eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty".split()
_VALUES: Final = {word: number for number, word in enumerate((*NUMBERS, *_TEENS))}
_WORDS: Final = "|".join(_VALUES)
_NUMBER: Final = re.compile(
    rf"(?<![\w.,])(?:\d{{1,3}}(?:,\d{{3}})+|\d+(?:\.\d+)?|{_WORDS})(?!\w|[.,]\d)", re.IGNORECASE
)
# "a cat riding a bike", "a cat and dogs": the article begins a scene and counts nothing. Not "a king", "a running dog".
_SCENE: Final = re.compile(r"\S+\s(?:.*\s)?(?:an?|the|and|with|in|on|at|\w+ing)\s.+", re.IGNORECASE)
_PROMPT: Final = re.compile(rf"(an?|\d+|{_WORDS})\s+(\S.*)", re.IGNORECASE)


class Counting:
    """Asks how many there are and scores strictly: 1 if the answer is the prompt's number, else 0.

    Args:
        question: what is asked, `{things}` standing for the prompt's noun; None for `QUESTION`.

    Raises:
        ValueError: the question lacks `{things}`.
    """

    def __init__(self, question: str | None = None) -> None:
        self.question = QUESTION if question is None else question
        if "{things}" not in self.question:
            raise ValueError(f"question={question!r} must hold {{things}}, which stands for the prompt's noun")

    def questions(self, prompts: Sequence[str]) -> list[str]:
        """One question a prompt.

        Raises:
            ValueError: a prompt that is not "n things".
        """
        return [self.question.replace("{things}", parse_prompt(prompt)[1]) for prompt in prompts]

    def judge(self, answers: Sequence[str], prompts: Sequence[str], device: torch.device) -> RewardOutput:
        """Scores float32 `(N,)`; `counted` in `info` is the number of each answer, NaN where it is not just one."""
        wanted = torch.tensor([float(parse_prompt(prompt)[0]) for prompt in prompts])
        found = [parse_answer(answer) for answer in answers]
        counted = torch.tensor([float("nan") if number is None else number for number in found], dtype=torch.float32)
        return RewardOutput((counted == wanted).float(), {"counted": counted})


def parse_prompt(prompt: str) -> tuple[int, str]:
    """Number and plural noun of a prompt: (4, "wolves") of "four wolves", (1, "cats") of "a cat".

    Raises:
        ValueError: the prompt does not begin with a number, `a` or `an`; or it begins with `a` and tells of more than
            one thing.
    """
    match = _PROMPT.fullmatch(prompt.strip().rstrip("."))
    single = match is not None and match[1].lower() in ("a", "an")
    if match is None or (single and _SCENE.fullmatch(match[2])):
        raise ValueError(
            f"prompt={prompt!r} is not of the form 'n things', so mode='count' cannot judge it; use prompts='counting' "
            f"or mode='describe'"
        )
    number = 1 if single else _value(match[1])
    return int(number), plural(match[2]) if number == 1 else match[2]


def parse_answer(answer: str) -> float | None:
    """The number that an answer holds, in digits or words up to twenty; None where it holds none, or several."""
    numbers = {_value(number) for number in _NUMBER.findall(answer)}
    return numbers.pop() if len(numbers) == 1 else None


def _value(number: str) -> float:
    known = _VALUES.get(number.lower())
    return float(number.replace(",", "")) if known is None else float(known)
