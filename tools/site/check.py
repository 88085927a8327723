"""What a built site must not do: load anything from elsewhere, or weigh more than a page should."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

LIMIT: Final = 1_000_000  # bytes of a page with everything that it loads; the search's index may have as many
# What a browser fetches by itself; <a href> is fetched by a reader.
_LOADS: Final = {"img": "src", "script": "src", "iframe": "src", "source": "src", "video": "src", "link": "href"}
_FETCHED: Final = {"stylesheet", "icon", "preload", "preconnect", "dns-prefetch", "modulepreload"}
# The theme's bundle would fetch a library for these from a host of others.
_FOREIGN: Final = ("mermaid", "glightbox", "pyodide")
_STYLED: Final = re.compile(r"url\(\s*['\"]?((?:https?:)?//[^)'\"]+)|@import\s+['\"]((?:https?:)?//[^'\"]+)")
# What a reader looks for first; each must be found by the site's own search.
_SOUGHT: Final = ("clip range", "guidance scale", "reward queries", "KL", "eta", "Stable-Baselines3")


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
    found = [
        f"{style.relative_to(html)} loads {''.join(address)}, which is elsewhere"
        for style in sorted(html.rglob("*.css"))
        for address in _STYLED.findall(style.read_text(encoding="utf-8"))
    ]
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


def search_problems(html: Path) -> list[str]:
    """A sentence for each fault of the site's search: no index here, too large a one, dead entries, no answer."""
    index, start = html / "search.json", (html / "index.html").read_text(encoding="utf-8")
    worker = re.search(r'"search":"([^"]+)"', start)
    if worker is None or not (html / worker[1]).is_file():
        return ["index.html names no worker of the search that is there; it needs project.plugins.search"]
    if not index.is_file():
        return ["search.json is not there; it needs project.plugins.search"]
    entries = json.loads(index.read_text(encoding="utf-8"))["items"]
    pages = sorted({entry["location"].partition("#")[0] for entry in entries})
    found = [f"search.json leads to {page}, which is not there" for page in pages if not (html / page).is_file()]
    if (size := index.stat().st_size) > LIMIT:
        found.append(f"search.json has {size} bytes, more than {LIMIT}; leave pages out of the search")
    texts = [f"{entry['title']} {entry['text']}".lower() for entry in entries]
    missing = [words for words in _SOUGHT if not any(words.lower() in text for text in texts)]
    return found + [f"search.json has no entry with {words!r}" for words in missing]
