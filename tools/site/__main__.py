"""Builds the documentation site, and refuses a link that leads nowhere, a page that nothing lists, or a heavy page.

    python -m tools.site    # build/site/html; zensical.toml has the navigation

The tools are in the extra `docs`; `make docs` installs them.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.site.check import problems, search_problems
from tools.site.stage import ROOT, reference_page, stage

SETTINGS = ROOT / "zensical.toml"


def main() -> None:
    """Build the site.

    Raises:
        SystemExit: something is wrong with it, which is printed.
    """
    settings = tomllib.loads(SETTINGS.read_text(encoding="utf-8"))["project"]
    pages, html = ROOT / settings["docs_dir"], ROOT / settings["site_dir"]
    written, listed = stage(pages), set(entries(settings["nav"]))
    if unlisted := sorted(str(page) for page in written if str(page) not in listed):
        raise SystemExit(f"docs/{unlisted[0]} is in no section of nav in {SETTINGS.name}; add it there")
    for page in listed:
        if page.startswith("reference/") and not (pages / page).exists():
            (pages / page).write_text(reference_page(Path(page).stem), encoding="utf-8")
    shutil.rmtree(html, ignore_errors=True)
    built = subprocess.run([sys.executable, "-m", "zensical", "build", "--strict", "--clean"], cwd=ROOT)
    if built.returncode:
        raise SystemExit(built.returncode)
    if found := [*problems(html), *search_problems(html)]:
        raise SystemExit("\n".join(found))
    print(f"{len(list(html.rglob('*.html')))} pages in {html}")


def entries(nav: list[Any]) -> Iterator[str]:
    """The pages of a navigation, in order."""
    for entry in nav:
        values = entry.values() if isinstance(entry, dict) else [entry]
        for value in values:
            yield from entries(value) if isinstance(value, list) else [value]


if __name__ == "__main__":
    main()
