"""What came of the trials: one JSON object a line, and the table of docs/reliability.md."""

import json
from pathlib import Path

from diffusion_gym.agents.report.marked import markdown_table, write_marked

ROWS = "trials.jsonl"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"


def read_rows(path):
    """The rows of earlier calls; a line that a kill cut off is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if "\n" in line]


def append_row(path, row):
    """Add a row as the last line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def table(rows, kinds):
    """Of each kind, how many held of how many that were tried."""
    lines = []
    for kind, trial in kinds.items():
        own = [row for row in rows if row["kind"] == kind]
        if own:
            held = sum(row["held"] for row in own)
            lines.append(
                (kind, " ".join((_function(trial).__doc__ or "").split()).rstrip("."), f"{held} of {len(own)}")
            )
    total = (f"{sum(row['held'] for row in rows)} of {len(rows)}") if rows else "0 of 0"
    return markdown_table(("kind", "trial", "held"), [*lines, ("all", "", total)])


def faults(rows):
    """A line for each trial that did not hold."""
    return "".join(f"{row['kind']} {row['trial']}: {row['fault']}\n" for row in rows if not row["held"])


def write_page(rows, kinds):
    """Write the table into the page."""
    write_marked(PAGE, {"table": table(rows, kinds)})


def _function(trial):
    return getattr(trial, "func", trial)  # of a partial
