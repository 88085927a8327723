"""Keeps a vision-language model's answers on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from diffusion_gym.rewards.vlm.base import VLM
from diffusion_gym.storage import read_json, write_json


class CachedVLM:
    """Asks `vlm` only what it has not answered before.

    One JSON file an answer, named by the hash of the model, the question and the picture. Files are written
    atomically, so several processes may share the folder; one that cannot be read is asked for again.

    Args:
        vlm: the model.
        folder: where the answers are kept.
    """

    def __init__(self, vlm: VLM, folder: str | Path) -> None:
        self.vlm, self.folder = vlm, Path(folder).expanduser()
        self.name, self.remote = vlm.name, vlm.remote

    def describe(self, pictures: torch.Tensor, questions: Sequence[str]) -> list[str | None]:
        """Answer one question a picture; see `VLM.describe`."""
        paths = [self._path(picture, question) for picture, question in zip(pictures.cpu(), questions, strict=True)]
        answers = [_stored(path) for path in paths]
        missing = [index for index, answer in enumerate(answers) if answer is None]
        if missing:
            fresh = self.vlm.describe(pictures[missing], [questions[index] for index in missing])
            for index, answer in zip(missing, fresh, strict=True):
                answers[index] = answer
                if answer is not None:
                    entry = {"model": self.name, "question": questions[index], "answer": answer}
                    write_json(paths[index], entry)
        return answers

    def cancel(self) -> None:
        """See `VLM.cancel`."""
        self.vlm.cancel()

    def _path(self, picture: torch.Tensor, question: str) -> Path:
        head = json.dumps([self.name, question, list(picture.shape)]).encode()
        key = hashlib.sha256(head + picture.numpy().tobytes()).hexdigest()
        return self.folder / key[:2] / f"{key}.json"


def _stored(path: Path) -> str | None:
    """The answer in a file; None where there is none."""
    try:
        answer = read_json(path)["answer"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return answer if isinstance(answer, str) else None
