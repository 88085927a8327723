"""The table of prompt sets, and the page that holds it."""

import re
import runpy
from pathlib import Path

import pytest

from diffusion_gym.prompts import PROMPTS, make_prompts
from diffusion_gym.prompts.__main__ import __file__ as MAIN
from diffusion_gym.prompts.__main__ import prompt_table

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
    """The files that the page shows, each written under the last name before it."""
    for before, text in re.findall(
        r"([^`\n][^\n]*(?:\n[^\n]+)*):\n\n```(?:json|csv|text)\n(.*?)```", PAGE, flags=re.DOTALL
    ):
        (tmp_path / re.findall(r"`(\w+\.\w+)`", before)[-1]).write_text(text)
    return tmp_path


def test_the_files_of_the_page_say_what_the_page_says(page_files):
    names = {"mine.txt", "bench.json", "bench.jsonl", "bench.csv", "data_meta.json", "held.json", "activities.json"}
    assert {path.name for path in page_files.iterdir()} == names
    made = {name: make_prompts(str(page_files / name)) for name in names}
    assert {name: len(prompts.prompts) for name, prompts in made.items()} == {name: 2 for name in names} | {
        "activities.json": 6
    }
    assert made["bench.json"].prompts == made["bench.jsonl"].prompts == made["bench.csv"].prompts
    for name in ("bench.json", "bench.jsonl", "bench.csv", "data_meta.json"):
        assert make_prompts(f"{page_files / name}#Colors").prompts == ("A red colored car.",)
    assert make_prompts(f"{page_files / 'held.json'}#new-objects").prompts == ("a chair",)
    assert made["activities.json"].prompts[-1] == "a mouse riding a bike with two mice"
    assert made["activities.json"].splits["new-animals"][0] == "an owl playing chess with two owls"


def test_the_python_of_the_page_runs():
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) == 1
    exec(blocks[0], {})
