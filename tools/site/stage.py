"""The folder of pages that the site is built from, so that every link of a page leads to a page of the site.

The pages of docs/ link to files all over the repository, as one who reads them there expects. Here a Markdown file
becomes a page, a module of the package its API reference, any other source file a page that shows it, and a picture a
copy; what those link to follows in the same way.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
_HOME: Final = "index.md"
# These install as parts of the package; see pyproject.toml.
_LINKED: Final = ("agents", "wrappers")
_LANGUAGES: Final = {".py": "python", ".sh": "bash", ".toml": "toml", ".json": "json"}
_COPIED: Final = (".png", ".svg", ".jpg", ".css", ".js")
_LINK: Final = re.compile(r"(\]\()([^)\s]+)(\))|(<img [^>]*?src=\")([^\"]+)(\")")
_CODE: Final = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)")
_LISTED: Final = re.compile(r"(\s*)([-*]|\d+\.) ")


def stage(folder: Path, root: Path = ROOT, roots: Iterable[str] = ("docs/**/*.md", "docs/assets/*")) -> list[Path]:
    """Write the pages of `docs/` and everything that they link to.

    Args:
        folder: where to; what it holds is replaced.
        root: the repository.
        roots: patterns of the files to begin with.

    Returns:
        The pages of docs/, relative to `folder`.

    Raises:
        ValueError: a link to a file that is not there.
    """
    shutil.rmtree(folder, ignore_errors=True)
    first = sorted({path for pattern in roots for path in root.glob(pattern)})
    waiting, done = list(first), set[Path]()
    while waiting:
        source = waiting.pop()
        if source not in done:
            done.add(source)
            waiting += _write(source, folder, root)
    return [place_of(path, root) for path in first if path.suffix == ".md"]


def place_of(source: Path, root: Path = ROOT) -> Path:
    """Where a file or folder of the repository stands among the pages."""
    inner = source.relative_to(root)
    if inner == Path("README.md"):
        return Path(_HOME)
    if inner.parts[0] == "docs" and not source.is_dir():
        return inner.relative_to("docs")
    if module := module_of(source, root):
        return Path("reference", f"{module}.md")
    if source.suffix in _COPIED:
        return Path("source", inner)
    if source.is_dir():
        return Path("source", inner, _HOME)
    if source.suffix == ".md":
        return inner.parent.with_suffix(".md") if source.name == "README.md" else Path(source.name.lower())
    return Path("source", f"{inner}.md")


def module_of(source: Path, root: Path = ROOT) -> str:
    """The module of the package that a file or folder is; empty where it is none."""
    inner = source.relative_to(root)
    if inner.parts[0] in _LINKED:
        inner = Path("diffusion_gym", inner)
    package = source.is_dir() and (source / "__init__.py").is_file()
    if inner.parts[0] != "diffusion_gym" or not (package or source.suffix == ".py"):
        return ""
    return ".".join(inner.with_suffix("").parts).removesuffix(".__init__")


def _write(source: Path, folder: Path, root: Path) -> list[Path]:
    """Write what a file becomes; returns the files that it links to."""
    place, found = folder / place_of(source, root), list[Path]()
    place.parent.mkdir(parents=True, exist_ok=True)
    if source == root / "README.md":
        return []  # the site has a first page of its own
    if source.suffix in _COPIED:
        shutil.copyfile(source, place)
    elif module := module_of(source, root):
        place.write_text(reference_page(module), encoding="utf-8")
    elif source.is_dir():
        names = "\n".join(f"- `{path.name}`" for path in sorted(source.iterdir()))
        place.write_text(f"# {source.relative_to(root)}\n\nThe folder holds:\n\n{names}\n", encoding="utf-8")
    elif source.suffix == ".md":

        def moved(link: str) -> str:
            path, mark, anchor = link.partition("#")
            if not path or "://" in path or path.startswith("mailto:"):
                return link
            target = (source.parent / path).resolve()
            if not target.is_relative_to(root) or not target.exists():
                raise ValueError(f"{source.relative_to(root)} links to {link!r}, which is not there; mend the link")
            found.append(target)
            return os.path.relpath(folder / place_of(target, root), place.parent) + mark + anchor

        place.write_text(page_text(source.read_text(encoding="utf-8"), moved), encoding="utf-8")
    else:
        place.write_text(_shown(source, root), encoding="utf-8")
    return found


def reference_page(module: str) -> str:
    """The page of a module, which mkdocstrings fills from its docstrings."""
    return f"# {module}\n\n::: {module}\n"


def _shown(source: Path, root: Path) -> str:
    """A page that shows a file; the search, which every page fetches, leaves it out."""
    language = _LANGUAGES.get(source.suffix, "text")
    shown = f"# {source.relative_to(root)}\n\n````{language}\n{source.read_text(encoding='utf-8')}\n````\n"
    return "---\nsearch:\n  exclude: true\n---\n\n" + shown


def page_text(text: str, moved: Callable[[str], str]) -> str:
    """A page as Python-Markdown reads it: links by `moved`, lists after an empty line, no markers of generated parts.

    Code, fenced or in backquotes, stays as it is.

    Args:
        text: the page.
        moved: what stands for the target of a link.
    """
    lines, fence, listed = list[str](), "", False
    for line in text.splitlines():
        mark = line.lstrip()[:3]
        if fence or mark in ("```", "~~~"):
            fence = "" if fence and mark == fence else fence or mark
            lines.append(line)
            continue
        if re.fullmatch(r"<!-- /?[\w .-]+ -->", line):
            line = ""
        begins = _LISTED.match(line) is not None
        if begins and not listed and lines and lines[-1].strip():
            lines.append("")
        listed = begins or (listed and line.startswith("  ")) or (listed and not line.strip())
        lines.append(_links_moved(line, moved))
    return "\n".join(lines) + "\n"


def _links_moved(line: str, moved: Callable[[str], str]) -> str:
    """A line with its links' targets replaced; a link's text may hold code, a target in code is none."""
    codes = [found.span() for found in _CODE.finditer(line)]

    def replaced(found: re.Match[str]) -> str:
        if any(start <= found.start() and found.end() <= end for start, end in codes):
            return found[0]
        before, target, after = (part for part in found.groups() if part is not None)
        return f"{before}{moved(target)}{after}"

    return _LINK.sub(replaced, line)
