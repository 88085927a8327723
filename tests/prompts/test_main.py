"""The table of prompt sets, and the page that holds it."""

import json
import re
import runpy
from pathlib import Path

import pytest

from diffusion_gym.prompts import PROMPTS, make_prompts
from diffusion_gym.prompts.__main__ import __file__ as MAIN
from diffusion_gym.prompts.__main__ import prompt_table
from pages import run_page

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "prompts.md").read_text(encoding="utf-8")


def test_the_page_holds_the_table():
    assert prompt_table() in PAGE, "write the output of `python -m diffusion_gym.prompts` into docs/prompts.md"


def test_the_table_has_every_set():
    rows = [row.split(" | ") for row in prompt_table().splitlines()[2:]]
    assert [row[0] for row in rows] == [f"| `{name}`" for name in PROMPTS]
    for name, row in zip(PROMPTS, rows, strict=True):
        prompts = make_prompts(name)
        assert int(row[1].replace(",", "")) == len(prompts.prompts)
        numbers = [int(number.replace(",", "")) for number in re.findall(r"\(([\d,]+)\)", row[3])]
        assert sum(numbers) >= len(prompts.held_out) and bool(numbers) == bool(prompts.held_out)


def test_the_module_prints_the_table(capsys):
    runpy.run_path(MAIN, run_name="__main__")
    assert capsys.readouterr().out == prompt_table()


@pytest.fixture
def page_files(tmp_path):
    """The files that the page shows, each written under the name before it."""
    for name, text in re.findall(r"\n`(\w+\.\w+)`[^\n]*:\n\n```(?:json|text)\n(.*?)```", PAGE, flags=re.DOTALL):
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_files_of_the_page_say_what_the_page_says(page_files):
    assert {path.name for path in page_files.iterdir()} == {"mine.txt", "bench.jsonl"}
    bench = make_prompts(str(page_files / "bench.jsonl"))
    assert len(bench.prompts) == len(make_prompts(str(page_files / "mine.txt")).prompts) == 2
    (blue,) = make_prompts(f"{page_files}/bench.jsonl/new-colors").prompts
    assert bench.metadata[blue] == {"category": "Colors", "objects": ["car"]}


def test_the_python_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawbench = {"A red car.": {"category": "Colors"}, "Two cats.": {"category": "Counting"}}
    Path("data_meta.json").write_text(json.dumps(drawbench))
    run_page("prompts.md")
    assert make_prompts("drawbench.jsonl").metadata == drawbench
    assert make_prompts("activities.txt").prompts[-1] == "an ant riding a bike"
