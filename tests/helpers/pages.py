"""The Python of the README and of the pages, run as written but for the sizes."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = {path.name: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}


def python_blocks(name):
    """The Python of a page: its blocks in order."""
    return re.findall(r"^```python\n(.*?)^```", PAGES[name].read_text(encoding="utf-8"), flags=re.S | re.M)


def run_page(name, smaller=()):
    """The names that the blocks of a page leave, run one after another with the texts of `smaller` replaced."""
    code = python_blocks(name)
    for large, small in dict(smaller).items():
        assert any(large in block for block in code), f"{name} no longer says {large!r}"
        code = [block.replace(large, small) for block in code]
    scope = {}
    for block in code:
        exec(block, scope)
    return scope


def assert_links_exist(name):
    """Every linked file, and every linked section of a page, is there."""
    path = PAGES[name]
    for target in re.findall(r"\]\(([^)]+)\)", _prose(path)):
        file, _, section = target.partition("#")
        if not file.startswith("http"):
            linked = path.parent / file if file else path
            assert linked.exists(), target
            assert not section or section in _sections(linked), target


def _prose(path):
    """A page without its code, which has no links and no headings."""
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)


def _sections(path):
    """The names of a page's sections in links, as GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", _prose(path), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
