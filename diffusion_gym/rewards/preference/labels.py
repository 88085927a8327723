"""A folder of labels: pictures of prompts, and what people said of two at a time. docs/people.md shows its files.

An answer is one line at the end of `answers.jsonl`, flushed to the disk before the next question is asked. Nothing is
ever rewritten there: an answer that is taken back is a further line.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal, TypeAlias, TypeVar

import numpy as np
import torch
from PIL import Image
from pydantic import Field, StringConstraints

from diffusion_gym.images import as_png, to_float
from diffusion_gym.schemas import Positive, Schema, parse_checked, read_checked
from diffusion_gym.storage import append_line, exact_json, write_bytes, write_json

T = TypeVar("T", bound=Schema)
Choice = Literal["first", "second", "equal"]
Person = Annotated[str, StringConstraints(pattern=r"^\S(?:.{0,38}\S)?$")]
_SHARE: Final[dict[str, float]] = {"first": 1.0, "second": 0.0, "equal": 0.5}
_PNG: TypeAlias = Annotated[str, Field(pattern=r"^\d{6,}\.png$")]


class Source(Schema):
    """`labels.json`: the pretrained model that the pictures are of, also where a tuned copy of it made them."""

    format: Literal["diffusion-gym labels 1"] = "diffusion-gym labels 1"
    model: str
    revision: str | None = None
    variant: str | None = None


class Picture(Schema):
    """A line of `pictures.jsonl`."""

    file: _PNG
    prompt: str
    made_by: str


class Answer(Schema):
    """A line of `answers.jsonl`: a person's answer number `number`, or that this person takes it back.

    The numbers of a person's answers are 1, 2, 3, ...; `repeats` is the number of an earlier one about the same two
    pictures, which are asked for again the other way round.
    """

    person: Person
    number: Positive
    first: _PNG
    second: _PNG
    answer: Literal["first", "second", "equal", "undone"]
    repeats: Positive | None = None

    @property
    def pair(self) -> frozenset[str]:
        """Its two pictures."""
        return frozenset((self.first, self.second))

    @property
    def share(self) -> float:
        """1 where the first picture was chosen, 0 where the second was, 1/2 where they are equal."""
        return _SHARE[self.answer]

    def chosen(self) -> str | None:
        """The picture that was chosen; None where they are equal."""
        return {"first": self.first, "second": self.second}.get(self.answer)


@dataclass(frozen=True)
class Agreement:
    """How often people gave the same answer to a question that was asked again.

    Attributes:
        repeated: questions asked twice.
        same: of these, those with the same answer.
    """

    repeated: int
    same: int


class Labels:
    """A folder of labels, read and checked as a whole.

    Args:
        folder: the folder.

    Attributes:
        source: the model that the pictures are of.
        pictures: by file name.
        answers: of each person, in their order, without those that were taken back.

    Raises:
        FileNotFoundError: the folder holds no labels.
        ValueError: a file is damaged, or of other labels; the message names file, line and remedy.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "labels.json").is_file():
            raise FileNotFoundError(
                f"{str(folder)!r} holds no labels (labels.json); make them with `diffusion-gym label`, or name "
                "their folder"
            )
        self.source = read_checked(Source, folder / "labels.json", "give a folder that `diffusion-gym label` made")
        listed = folder / "pictures.jsonl"
        self.pictures = {line.file: line for _, line in _lines(listed, Picture)} if listed.is_file() else {}
        self.answers: dict[str, list[Answer]] = {}
        for where, line in _lines(self._file, Answer) if self._file.is_file() else ():
            self._count(where, line)

    @property
    def _file(self) -> Path:
        return self.folder / "answers.jsonl"

    @classmethod
    def begin(cls, folder: Path, source: Source) -> Labels:
        """Those of a folder, which is made if it is not there.

        Raises:
            FileExistsError: the folder holds other files.
            ValueError: its labels are of another model, or damaged.
        """
        if not (folder / "labels.json").exists():
            if folder.exists() and (
                not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir())
            ):
                raise FileExistsError(f"out={str(folder)!r} holds other files than labels; choose another --out")
            write_json(folder / "labels.json", source.model_dump())
        found = cls(folder)
        if found.source != source:
            raise ValueError(
                f"out={str(folder)!r} holds labels of model={found.source.model!r} ({_kind(found.source)}), and these "
                f"pictures are of model={source.model!r} ({_kind(source)}); choose another --out"
            )
        return found

    def add_pictures(self, pictures: torch.Tensor, prompts: Sequence[str], made_by: str) -> None:
        """Store pictures, uint8 `(N, H, W, 3)`, of N prompts; `made_by` says what made them."""
        number = 1 + max((int(name.removesuffix(".png")) for name in self.pictures), default=0)
        added = [
            Picture(file=f"{number + row:06}.png", prompt=prompt, made_by=made_by) for row, prompt in enumerate(prompts)
        ]
        for entry, picture in zip(added, pictures.cpu().numpy(), strict=True):
            write_bytes(self.path(entry.file), as_png(Image.fromarray(picture)))
        self.pictures |= {entry.file: entry for entry in added}
        lines = [exact_json(entry.model_dump()) + "\n" for entry in self.pictures.values()]
        write_bytes(self.folder / "pictures.jsonl", "".join(lines).encode())

    def path(self, name: str) -> Path:
        """The file of a picture; it may be missing."""
        return self.folder / "pictures" / name

    def images(self, names: Sequence[str]) -> torch.Tensor:
        """Pictures as float `(N, 3, H, W)` in [0, 1].

        Raises:
            FileNotFoundError: the file of one is missing.
            ValueError: a file is no picture, or they are of several sizes.
        """
        found = [_read(self.path(name)) for name in names]
        sizes = {picture.shape for picture in found}
        if len(sizes) > 1:
            raise ValueError(
                f"{str(self.folder)!r} holds pictures of the sizes {sorted(sizes)}; keep those of one size"
            )
        return to_float(torch.from_numpy(np.stack(found)))

    def append(self, line: Answer) -> None:
        """Add an answer, or that one is taken back; it is on the disk when this returns.

        Raises:
            ValueError: it is not the next one of this person; nothing is written.
            OSError: it cannot be written, and does not count.
        """
        self._count("the answer", line)
        try:
            append_line(self._file, exact_json(line.model_dump(exclude_none=True)))
        except OSError:
            self.answers = Labels(self.folder).answers
            raise

    def all_answers(self) -> list[Answer]:
        """Those of all people."""
        return [answer for answers in self.answers.values() for answer in answers]

    def agreement(self, people: Iterable[str] | None = None) -> Agreement:
        """How far people agree with themselves; by default all of them together."""
        repeated = same = 0
        for person in self.answers if people is None else people:
            answers = self.answers.get(person, [])
            for answer in answers:
                if answer.repeats is not None:
                    repeated += 1
                    same += answer.chosen() == answers[answer.repeats - 1].chosen()
        return Agreement(repeated, same)

    def _count(self, where: str, line: Answer) -> None:
        answers = self.answers.setdefault(line.person, [])
        strange = sorted(line.pair - self.pictures.keys())
        remedy = "keep to the files of one folder of labels, as `diffusion-gym label` wrote them"
        if strange or self.pictures[line.first].prompt != self.pictures[line.second].prompt:
            told = f"{strange[0]!r} is no picture of pictures.jsonl" if strange else "the two pictures have two prompts"
            raise ValueError(f"{where}: {told}; {remedy}")
        if line.answer == "undone":
            if not answers or answers[-1].number != line.number:
                raise ValueError(
                    f"{where}: {line.person!r} takes back number={line.number}, which is not the last; {remedy}"
                )
            answers.pop()
            return
        if line.number != len(answers) + 1:
            raise ValueError(
                f"{where}: number={line.number} of {line.person!r} comes after {len(answers)} answers; {remedy}"
            )
        if line.repeats is not None and (line.repeats >= line.number or answers[line.repeats - 1].pair != line.pair):
            raise ValueError(f"{where}: repeats={line.repeats} is no earlier answer about these pictures; {remedy}")
        answers.append(line)


def _kind(source: Source) -> str:
    return f"revision={source.revision!r}, variant={source.variant!r}"


def _lines(path: Path, schema: type[T]) -> list[tuple[str, T]]:
    """The lines of a file with where they stand; without the last one where a kill cut it off."""
    *lines, _torn = path.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        found.append(
            (where, parse_checked(schema, line, where, "mend the line, or take it out; the other lines are kept"))
        )
    return found


def _read(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            return np.array(picture.convert("RGB"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{str(path)!r} is missing, and answers are about it; put it back from where the labels were made"
        ) from None
    except OSError as error:
        raise ValueError(
            f"{str(path)!r} is no picture ({error}); put it back from where the labels were made"
        ) from error
