"""Which two pictures a person is asked about next: those whose answer the fit so far is least sure of."""

from __future__ import annotations

import itertools
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from diffusion_gym.rewards.preference.bradley_terry import Posterior, fit
from diffusion_gym.rewards.preference.labels import Answer, Choice, Labels

_REPEAT_EVERY: Final = 10  # a tenth of the questions has been asked before
_PRECISION: Final = 0.03  # of the prior while answers come in, times the number of features
_CANDIDATES: Final = 256  # pairs of a prompt that are compared


@dataclass(frozen=True)
class Question:
    """Two pictures of a prompt.

    Attributes:
        number: that of the person's answer.
        first: file of the picture that is shown first.
        second: of the other one.
        prompt: the prompt.
        repeats: number of the answer that it asks for again.
    """

    number: int
    first: str
    second: str
    prompt: str
    repeats: int | None = None


class NoQuestion(ValueError):
    """There are no two pictures left to ask about."""


class Questions:
    """The questions to each person, and their answers.

    The same answers lead to the same question, so that a page that is loaded again shows what it showed.

    Args:
        labels: the folder; answers go there.
        features: of each picture, in the order of `labels.pictures`, float64 `(N, D)` of mean 0 and deviation 1.
        seed: of what is left to chance: candidates, sides, what is asked again.
    """

    def __init__(self, labels: Labels, features: torch.Tensor, seed: int = 0) -> None:
        self.labels, self._seed = labels, seed
        self._features = features
        self._row = {name: row for row, name in enumerate(labels.pictures)}
        self._pending: dict[str, Question] = {}

    def question(self, person: str) -> Question:
        """What to ask this person next; the same until it is answered.

        Raises:
            NoQuestion: of no prompt are there two pictures whose files are there.
        """
        pending = self._pending.get(person)
        if pending is None or not (self._is_there(pending.first) and self._is_there(pending.second)):
            pending = self._pending[person] = self._next(person)
        return pending

    def answer(self, person: str, number: int, choice: Choice) -> bool:
        """Store an answer.

        Returns:
            Whether it counts; an answer to another question than the present one does not, as from a second tab.

        Raises:
            OSError: it cannot be written, and does not count.
        """
        asked = self._pending.get(person)
        if asked is None or asked.number != number:
            return False
        own = {"number": number, "first": asked.first, "second": asked.second, "repeats": asked.repeats}
        self.labels.append(Answer(person=person, answer=choice, **own))
        del self._pending[person]
        return True

    def undo(self, person: str, number: int) -> bool:
        """Take back a person's last answer, number `number`, and ask for it again; false where it is another's turn."""
        answers = self.labels.answers.get(person, [])
        if not answers or answers[-1].number != number:
            return False
        last = answers[-1]
        self.labels.append(last.model_copy(update={"answer": "undone"}))
        prompt = self.labels.pictures[last.first].prompt
        self._pending[person] = Question(number, last.first, last.second, prompt, last.repeats)
        return True

    def _is_there(self, name: str) -> bool:
        return self.labels.path(name).is_file()

    def _next(self, person: str) -> Question:
        answers = self.labels.answers.get(person, [])
        number = len(answers) + 1
        rng = np.random.default_rng([self._seed, zlib.crc32(person.encode()), number])
        if number % _REPEAT_EVERY == 0 and (again := self._asked_again(answers, rng)) is not None:
            return Question(number, again.second, again.first, self.labels.pictures[again.first].prompt, again.number)
        first, second = self._least_sure(answers, rng)
        if rng.random() < 0.5:
            first, second = second, first
        return Question(number, first, second, self.labels.pictures[first].prompt)

    def _asked_again(self, answers: Sequence[Answer], rng: np.random.Generator) -> Answer | None:
        """An earlier question of this person that was not asked again so far, and not just now."""
        again = {answer.repeats for answer in answers}
        open_ = [
            answer
            for answer in answers[: -_REPEAT_EVERY // 2]
            if answer.repeats is None and answer.number not in again and all(map(self._is_there, answer.pair))
        ]
        return open_[rng.integers(len(open_))] if open_ else None

    def _least_sure(self, answers: Sequence[Answer], rng: np.random.Generator) -> tuple[str, str]:
        """The pair of the prompt with the fewest answers that would teach the fit most.

        An answer tells p (1 - p) times the variance of the pair's score difference: little where the fit is sure, and
        little where the pictures look alike to it.
        """
        asked = {answer.pair for answer in answers}
        counts = Counter(self.labels.pictures[answer.first].prompt for answer in self.labels.all_answers())
        groups: dict[str, list[str]] = {}
        for name, picture in self.labels.pictures.items():
            if self._is_there(name):
                groups.setdefault(picture.prompt, []).append(name)
        order = rng.permutation(list(groups))
        for prompt in sorted(order, key=lambda prompt: counts[prompt]):
            pairs = [pair for pair in itertools.combinations(groups[prompt], 2) if frozenset(pair) not in asked]
            if pairs:
                chosen = [pairs[row] for row in rng.permutation(len(pairs))[:_CANDIDATES]]
                return chosen[int(self._gain(chosen).argmax())]
        raise NoQuestion(
            f"{str(self.labels.folder)!r} holds no two pictures of a prompt that were not asked about; add pictures "
            "with `diffusion-gym label`, or put missing files back"
        )

    def _gain(self, pairs: Sequence[tuple[str, str]]) -> torch.Tensor:
        posterior, differences = self._posterior(), self._differences(pairs)
        chances = (differences @ posterior.weights).sigmoid()
        return chances * (1 - chances) * posterior.spread(differences).square()

    def _posterior(self) -> Posterior:
        answers = self.labels.all_answers()
        differences = self._differences([(answer.first, answer.second) for answer in answers])
        shares = torch.tensor([answer.share for answer in answers], dtype=torch.float64)
        return fit(differences, shares, precision=_PRECISION * self._features.shape[1])

    def _differences(self, pairs: Sequence[tuple[str, str]]) -> torch.Tensor:
        rows = torch.tensor([[self._row[name] for name in pair] for pair in pairs], dtype=torch.long).view(-1, 2)
        return self._features[rows[:, 0]] - self._features[rows[:, 1]]
