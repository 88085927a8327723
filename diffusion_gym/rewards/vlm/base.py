"""What a reward needs of a vision-language model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, Protocol

import torch

from diffusion_gym.rewards.base import RewardError


class VLMError(RewardError):
    """A vision-language model gave no answer."""


_REASONING: Final = re.compile(r"<think>.*?</think>|\A(?:(?!<think>).)*</think>|<think>.*", re.DOTALL | re.IGNORECASE)


def without_reasoning(answer: str | None) -> str | None:
    """What a model answered after it has thought aloud; None where it came to no answer.

    A chat template may hold the first `<think>`, so that the answer begins within; an answer that ends within was cut
    off.
    """
    if answer is None or "think>" not in answer.lower():
        return answer
    return _REASONING.sub("", answer).strip() or None


class VLM(Protocol):
    """Answers questions about pictures.

    Attributes:
        name: says which model it is and how it is asked; a part of the cache's keys.
        remote: whether it runs outside of this process, so that waiting for it leaves the device free.
    """

    name: str
    remote: bool

    def describe(self, pictures: torch.Tensor, questions: Sequence[str]) -> list[str | None]:
        """Answer one question a picture.

        Args:
            pictures: uint8 `(N, H, W, 3)`, or `(N, K, H, W, 3)` for K pictures a question.
            questions: N strings.

        Returns:
            N answers; None where there was none.

        Raises:
            VLMError: there was no answer at all.
        """
        ...

    def cancel(self) -> None:
        """Have every `describe` that waits in another thread raise VLMError now."""
        ...
