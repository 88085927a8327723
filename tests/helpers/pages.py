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
    """Every linked file, and every linked section of the page itself, is there."""
    path = PAGES[name]
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)  # code has no links
    for target in re.findall(r"\]\(([^)]+)\)", text):
        file, _, section = target.partition("#")
        assert file.startswith("http") or (path.parent / file).exists(), target
        assert file or f"# {section.replace('-', ' ')}" in text.lower().replace("-", " "), target
