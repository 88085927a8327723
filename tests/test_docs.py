"""The Python of the README and of docs/: every page runs in a test, or at least compiles and defines its names."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path.name: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
# What those pages need is not there: the weights of SD 1.4 and of a VLM, and a package that only old libraries run.
FRAGMENTS = {"prompt-alignment.md", "reward-server.md"}
# Run here, with fewer pictures; every other page has a test of its own, which names it.
_FEWER = {"num_inference_steps=5": "num_inference_steps=2"}
SMALLER = {
    "tracking.md": {"num_envs=16": "num_envs=2", "=128": "=4", "=64": "=2", "paths=16": "paths=1", **_FEWER},
    "scale-out.md": {"num_envs=8": "num_envs=2", "=32": "=4", "=16": "=2", **_FEWER},
}


def blocks(name):
    return re.findall(r"^```python\n(.*?)^```", PAGES[name].read_text(encoding="utf-8"), flags=re.S | re.M)


WITH_PYTHON = [name for name in PAGES if blocks(name)]
SCRIPTS = [name for name in WITH_PYTHON if not blocks(name)[0].startswith(">>>")]


def test_every_page_with_python_is_run_by_a_test():
    tests = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    tests.pop(Path(__file__).resolve())
    elsewhere = {name for name in WITH_PYTHON if any(name in text and "python" in text for text in tests.values())}
    doctests = {name for name in WITH_PYTHON if any(name in text and "doctest" in text for text in tests.values())}
    assert set(WITH_PYTHON) - elsewhere - doctests - FRAGMENTS == set(SMALLER)
    assert len(SCRIPTS) >= 8


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_python_compiles_and_no_name_comes_from_nowhere(name):
    """Blocks of a page follow one another, as in a notebook."""
    code = "\n".join(blocks(name))
    compile(code, name, "exec")
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821,F823", "--quiet", "-"]
    done = subprocess.run(command, input=code, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_name_from_nowhere_is_found():
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821,F823", "--quiet", "-"]
    done = subprocess.run(command, input="Trainer(envs)", capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "Trainer" in done.stdout


@pytest.mark.parametrize("name", SMALLER)
def test_the_python_of_the_page_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {}
    for block in blocks(name):
        for large, small in SMALLER[name].items():
            assert large in block
            block = block.replace(large, small)
        exec(block, scope)
    (metrics,) = tmp_path.rglob("metrics.jsonl")
    assert len(metrics.read_text().splitlines()) == 2


def test_the_readme_says_of_which_reward_its_snippet_and_its_tables_are():
    text = " ".join(PAGES["README.md"].read_text(encoding="utf-8").split())
    snippet, after = text.split("## The environment in ten lines")[1].split("This reward is graded", 1)
    assert "strict" not in snippet and "strict success" in after and '{"strict": True}' in after
