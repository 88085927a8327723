"""The list of findings/README.md, from the comments at the heads of the scripts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parents[2]
FOLDER: Final = ROOT / "findings"
PAGES: Final = {"findings/README.md": ("findings",)}
_HEAD: Final = re.compile(
    r"#!/usr/bin/env bash\n(?P<about>(?:# .*\n)+?)# Seen(?P<where>[^\n:]*): (?P<seen>.*\n(?:# .*\n)*?)"
    r"# Here: (?P<here>.*\n(?:# .*\n)*?)(?!#)"
)
_VERSIONS: Final = re.compile(r"[\w-]+ \d+(?:\.\d+)+(?: with [\w-]+ \d+(?:\.\d+)+)*")


class Finding(NamedTuple):
    """A script of findings/: the libraries and versions, what they do, what it prints, and what this project does."""

    name: str
    versions: str
    about: str
    where: str
    seen: str
    here: str


def read(path: Path) -> Finding:
    """The finding of a script.

    Raises:
        ValueError: its head is another than versions, behaviour, `Seen:` and `Here:`.
    """
    head = _HEAD.match(path.read_text(encoding="utf-8"))
    about = "" if head is None else _text(head["about"])
    versions = _VERSIONS.match(about)
    if head is None or versions is None:
        raise ValueError(
            f"{path.name}: its head must be a comment that begins with the library and its version, and ends with "
            "`# Seen: what it prints` and `# Here: what this project does about it`"
        )
    about = about.removeprefix(versions[0]).lstrip(": ")
    seen = "\n".join(line.removeprefix("# ").strip() for line in head["seen"].splitlines())
    return Finding(path.stem, versions[0], about, head["where"].strip(), seen, _text(head["here"]))


def _text(comment: str) -> str:
    return " ".join(line.removeprefix("# ").strip() for line in comment.splitlines())


def parts() -> dict[str, str]:
    """The marked part of the page, by library."""
    found = [read(path) for path in sorted(FOLDER.glob("*.sh"))]
    return {"findings": "\n\n".join(_section(finding) for finding in found)}


def _section(finding: Finding) -> str:
    library, _, words = finding.name.replace("_", " ").partition(" ")
    first = finding.about.partition(" ")[0]
    about = finding.about[:1].upper() + finding.about[1:] if first.isalpha() else finding.about  # else it is code
    where = f" {finding.where}" if finding.where else ""
    return "\n".join(
        [
            f"## {library}: {words}",
            "",
            f"**{finding.versions}.** {about}",
            "",
            f"Here: {finding.here}",
            "",
            f"[`{finding.name}.sh`]({finding.name}.sh) shows it{where}:",
            "",
            "```text",
            finding.seen,
            "```",
        ]
    )
