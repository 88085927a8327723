"""Markdown pages of which scripts write a part: what stands between `<!-- name -->` and `<!-- /name -->`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from diffusion_gym.storage import write_text


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], rule: str = "---") -> str:
    """A table of cells, which hold no `|`; the rule below the head aligns the columns, `---:` to the right."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, [rule] * len(head), *rows))


def filled(text: str, parts: Mapping[str, str]) -> str:
    """The text of a page with its marked parts written anew; the rest stays.

    Args:
        text: the page.
        parts: what stands between the markers, by name.

    Raises:
        ValueError: a part without its markers.
    """
    for name, part in parts.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, begun, rest = text.partition(begin)
        _, ended, after = rest.partition(end)
        if not (begun and ended):
            raise ValueError(f"the page has no place for {name!r}; put {begin} and {end} into it")
        text = f"{before}{begin}\n{part}\n{end}{after}"
    return text


def write_marked(page: Path, parts: Mapping[str, str]) -> None:
    """Write the marked parts of a page anew.

    Raises:
        ValueError: a part without its markers; the page stays as it is.
    """
    try:
        write_text(page, filled(page.read_text(encoding="utf-8"), parts))
    except ValueError as error:
        raise ValueError(f"{page}: {error}") from error
