"""benchmarks/stable_diffusion.py on the tiny pipeline: rows, records, table; the figures themselves need a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion_gym.storage import write_json

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "stable_diffusion.py"


def call(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True)


def test_rows_are_measured_and_recorded(tiny_pipeline, tmp_path):
    common = ("--model", tiny_pipeline, "--device", "cpu", "--dtype", "float32", "--steps", 3, "--samples", 3)
    done = call("run", *common, "--batches", 2, "--trainables", "lora", "--records", tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert record["samples"] == 4 and record["picture"] == [8, 8, 3] and record["peak_memory_gb"] is None
    total = record["rollout_seconds"] + record["update_seconds"]
    assert record["images_per_second"] == pytest.approx(4 / total)
    assert record["update_transitions_per_second"] == pytest.approx(4 * 3 / record["update_seconds"])


def test_a_row_that_fails_is_recorded(tmp_path):
    common = ("--model", tmp_path / "missing", "--device", "cpu", "--batches", 1, "--trainables", "lora")
    assert call("run", *common, "--records", tmp_path / "records").returncode == 0
    (path,) = (tmp_path / "records").glob("*.json")
    assert "missing" in json.loads(path.read_text())["error"]


def test_page_is_made_of_the_records_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- gpu -->\nold\n<!-- /gpu -->\nbelow\n")
    write = ("page", "--records", tmp_path / "records", "--page", page)
    assert call(*write).returncode == 0
    assert "Not measured" in page.read_text() and page.read_text().endswith("\nbelow\n")
    row = {"trainable": "lora", "batch": 4, "reward": "Compressibility", "card": "Some Card"}
    figures = {"rollout_images_per_second": 1.5, "update_transitions_per_second": 20.0, "images_per_second": 0.75}
    write_json(tmp_path / "records" / "a.json", {**row, **figures, "peak_memory_gb": 7.04})
    write_json(tmp_path / "records" / "b.json", {**row, "batch": 64, "error": "out of memory"})
    assert call(*write).returncode == 0
    text = page.read_text()
    assert "Card: Some Card." in text and "| lora | 4 | Compressibility | 1.50 | 20.0 | 0.750 | 7.0 |" in text
    assert "| lora | 64 | Compressibility | out of memory |" in text and "old" not in text
