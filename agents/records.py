"""Files of one JSON object a line, each with its `iteration`: `metrics.jsonl` and `development.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_gym.storage import json_text, write_text


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of such a file; a last line cut off by a kill is left out."""
    records: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
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
