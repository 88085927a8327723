"""Files of one JSON object a line, each with its `iteration`: `metrics.jsonl` and `development.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_gym.storage import json_text, parse_json, write_text


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of such a file; a last line cut off by a kill is left out.

    Raises:
        ValueError: any other line is no record; the file is as it was.
    """
    if not path.exists():
        return []
    *lines, torn = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records: list[dict[str, Any]] = []
    for number, line in enumerate([*lines, torn] if torn else lines, 1):
        try:
            record = parse_json(line)
            if isinstance(record["iteration"], bool) or not isinstance(record["iteration"], int):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            if number > len(lines):
                break
            raise ValueError(
                f"{path}, line {number}, is no record of an iteration: {line[:80]!r}; mend the line or remove it"
            ) from None
        records.append(record)
    return records


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Add a record as the last line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json_text(record) + "\n")


def drop_records_after(path: Path, iteration: int) -> None:
    """Keep the records up to an iteration, that of the checkpoint from which a run goes on."""
    kept = [json_text(row) for row in read_metrics(path) if row["iteration"] <= iteration]
    write_text(path, "".join(line + "\n" for line in kept))
