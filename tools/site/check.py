"""What a built site must not do: load anything from elsewhere, or weigh more than a page should."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

LIMIT: Final = 1_000_000  # bytes of a page with everything that it loads, the search's index apart
# What a browser fetches by itself; <a href> is fetched by a reader.
_LOADS: Final = {"img": "src", "script": "src", "iframe": "src", "source": "src", "video": "src", "link": "href"}
_FETCHED: Final = {"stylesheet", "icon", "preload", "preconnect", "dns-prefetch", "modulepreload"}
# The theme's bundle would fetch a library for these from a host of others.
_FOREIGN: Final = ("mermaid", "glightbox", "pyodide")


class Loaded(HTMLParser):
    """The addresses that a page makes a browser fetch, and the classes of its elements."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.classes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what an element loads."""
        given = dict(attrs)
        self.classes.update((given.get("class") or "").split())
        address = given.get(_LOADS.get(tag, "")) or ""
        if address and (tag != "link" or _FETCHED & set((given.get("rel") or "").split())):
            self.addresses.append(address)


def problems(html: Path) -> list[str]:
    """A sentence for each page that loads something from elsewhere, something missing, or too much."""
    found = list[str]()
    for page in sorted(html.rglob("*.html")):
        loaded, name = Loaded(), page.relative_to(html)
        loaded.feed(page.read_text(encoding="utf-8"))
        found += [
            f"{name} has a .{each}, for which the theme loads a script from elsewhere"
            for each in _FOREIGN
            if each in loaded.classes
        ]
        weight = page.stat().st_size
        for address in dict.fromkeys(loaded.addresses):
            parts = urlsplit(address)
            if parts.scheme == "data":
                continue
            if parts.scheme or parts.netloc:
                found.append(f"{name} loads {address}, which is elsewhere")
                continue
            base = html if parts.path.startswith("/") else page.parent
            file = base / unquote(parts.path).lstrip("/")
            if not file.is_file():
                found.append(f"{name} loads {address}, which is not there")
            else:
                weight += file.stat().st_size
        if weight > LIMIT:
            found.append(f"{name} weighs {weight:,} bytes with what it loads; at most {LIMIT:,}, so split it")
    return found
