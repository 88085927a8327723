"""What a reward needs of a vision-language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from diffusion_gym.rewards.base import RewardError


class VLMError(RewardError):
    """A vision-language model gave no answer."""


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
            pictures: uint8 `(N, H, W, 3)`.
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
