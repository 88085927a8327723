"""The parts of pages that scripts write, between markers: `<!-- name -->` and `<!-- /name -->`."""

from __future__ import annotations

from pathlib import Path

from diffusion_gym.storage import write_text


def write_marked(page: Path, name: str, text: str) -> None:
    """Write what stands between the markers `name` of a page anew; the rest of the page stays."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    write_text(page, f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}")
