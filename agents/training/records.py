"""Files of one JSON object a line, each with its `iteration`: `metrics.jsonl` and `development.jsonl`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import AllowInfNan, ConfigDict, model_validator

from diffusion_gym.schemas import Count, Schema, parse_checked
from diffusion_gym.storage import json_text, write_bytes

_Number = Annotated[float, AllowInfNan(True)] | None  # null is NaN, which files of the first versions hold as such
_NAMED: Final = 10  # lines of a warning
_REMEDY: Final = "mend the line or remove it"


class _Record(Schema):
    """Any line: what else it has is the agent's or the reward's."""

    model_config = ConfigDict(extra="allow")
    iteration: Count


class _Metrics(_Record):
    reward_queries: Count
    reward_mean: _Number
    seconds: _Number
    images_per_second: _Number = None
    success_mean: _Number = None
    clip_fraction: _Number = None
    approx_kl: _Number = None
    grad_norm: _Number = None
    loss: _Number = None


class _Development(_Record):
    reward_queries: Count
    reward_mean: _Number
    base_reward_mean: _Number
    improved: _Number
    reward_path: list[_Number]
    base_reward_path: list[_Number]
    rewards: list[_Number] = []  # of the current pictures, which the first versions did not keep

    @model_validator(mode="after")
    def _paths_are_of_one_length(self) -> _Development:
        if len(self.reward_path) != len(self.base_reward_path):
            sizes = len(self.reward_path), len(self.base_reward_path)
            raise ValueError(f"reward_path and base_reward_path are of different lengths, {sizes[0]} and {sizes[1]}")
        return self


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; none where there is no file.

    A last line that a kill cut off is left out. So is any other line that is no record, which one warning names.

    Raises:
        ValueError: no line is a record.
    """
    return [row for row in _lines(path, _Metrics) if isinstance(row, dict)]


def read_development(path: Path) -> list[dict[str, Any]]:
    """The records of a `development.jsonl`; see `read_metrics`."""
    return [row for row in _lines(path, _Development) if isinstance(row, dict)]


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Add a record as the last line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json_text(record) + "\n")


def drop_records_after(path: Path, iteration: int) -> None:
    """Keep the records up to an iteration, that of the checkpoint from which a run goes on.

    A line before the last of them that is no record stays as it is.

    Raises:
        ValueError: no line is a record; the file is as it was.
    """
    rows = _lines(path, _Record)
    kept = [isinstance(row, dict) and row["iteration"] <= iteration for row in rows]
    last = max((index for index, stays in enumerate(kept) if stays), default=-1)
    lines = [row for index, row in enumerate(rows) if kept[index] or (isinstance(row, bytes) and index < last)]
    write_bytes(path, b"".join((row if isinstance(row, bytes) else json_text(row).encode()) + b"\n" for row in lines))


def _lines(path: Path, schema: type[_Record]) -> Sequence[dict[str, Any] | bytes]:
    """The lines of a file: as records, those that are none as they are, and not what a kill left of the last."""
    if not path.exists():
        return []
    *lines, torn = path.read_bytes().split(b"\n")
    found: list[dict[str, Any] | bytes] = []
    wrong: list[tuple[int, ValueError]] = []
    for number, line in enumerate([*lines, torn] if torn else lines, 1):
        try:
            record = parse_checked(schema, line, f"{path}, line {number}, is no record of an iteration", _REMEDY)
            found.append(record.model_dump(exclude_unset=True))
        except ValueError as error:
            if number <= len(lines):
                found.append(line)
                wrong.append((number, error))
    if wrong and len(wrong) == len(found):
        raise wrong[0][1]
    if wrong:
        numbers = ", ".join(str(number) for number, _ in wrong[:_NAMED]) + (", ..." if len(wrong) > _NAMED else "")
        which = "line" if len(wrong) == 1 else "lines"
        warnings.warn(f"{path}: all but {which} {numbers} is read ({wrong[0][1]})", stacklevel=3)
    return found
