"""The options of the command `page`, which the scripts of benchmarks/ share."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PageOptions:
    """Write what stands between the script's markers in a page anew, from the records alone."""

    records: Path
    """The records."""
    page: Path
    """The page."""
