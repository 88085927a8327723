"""The notebook quick-start runs, in a smoke form; what is stored in it comes from a clean run."""

import ast
import base64
import io
import re
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from PIL import Image

from tools import quickstart

matplotlib.use("Agg")
ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(notebook):
    """What the cells wrote, without the pictures."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return [output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs]


def pictures(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]


def test_the_cells_run(stored, tmp_path, monkeypatch, capsys):
    """In this process, with few queries and steps; the slow test has a fresh kernel."""
    monkeypatch.setenv("QUICKSTART_QUERIES", "8")
    monkeypatch.chdir(tmp_path)
    shown, scope = [], {}
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf()))
    for cell in code_cells(stored):
        exec(cell.source.replace("num_inference_steps=10", "num_inference_steps=3"), scope)
    plt.close("all")
    assert len(shown) == len(pictures(stored)) == 5
    assert "8 samples of each model from the same noise" in capsys.readouterr().out
    assert (tmp_path / "runs" / "quickstart" / "model" / "model_index.json").exists()


@pytest.mark.slow
def test_the_notebook_runs(stored, tmp_path, monkeypatch):
    """A fresh kernel in a folder of its own; any cell that raises fails the test."""
    monkeypatch.setenv("QUICKSTART_QUERIES", "8")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    done = quickstart.cleaned(quickstart.executed(nbformat.read(NOTEBOOK, as_version=4), tmp_path))
    assert len(pictures(done)) == len(pictures(stored)) == 5
    assert "8 samples of each model from the same noise" in "".join(texts(done))
    assert (tmp_path / "runs" / "quickstart" / "model" / "model_index.json").exists()
    rows = (tmp_path / "runs" / "quickstart" / "location" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 2


def test_every_code_cell_was_executed_in_order(stored):
    nbformat.validate(stored)
    cells = code_cells(stored)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        ast.parse(cell.source)
        assert cell.metadata == {}


def test_the_stored_outputs_are_clean(stored):
    outputs = [output for cell in code_cells(stored) for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert not any(output.get("name") == "stderr" for output in outputs)
    for text in texts(stored):
        assert not re.search(r"/(work|tmp|home|root|Users|opt|usr)\b|[A-Z]:\\|0x[0-9a-f]{6}|Warning", text), text
    assert NOTEBOOK.stat().st_size < 300_000


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def notebook_with(*outputs):
    timing = {"execution": {"iopub.execute_input": "2020-01-01T00:00:00.000000Z"}}
    return new_notebook(cells=[new_code_cell("x", outputs=list(outputs), metadata=timing)])


def test_cleaning_keeps_results_and_drops_the_progress():
    told = "8 images to score, 1 iteration: about 2 s\n8/8 images (100%), reward 1.000, 4.0 images/s, after 2 s\n"
    progress = new_output("stream", name="stderr", text=told)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    both = {"image/png": png(noise), "image/jpeg": "anBn", "text/plain": "<a picture>"}
    shown = new_output("display_data", data=both, metadata={"size": 1})
    said = new_output("stream", name="stdout", text="reward 1\n")
    cell = quickstart.cleaned(notebook_with(progress, shown, said)).cells[0]
    assert [output.output_type for output in cell.outputs] == ["display_data", "stream"]
    assert set(cell.outputs[0].data) == {"image/png", "text/plain"} and cell.outputs[0].metadata == {}
    assert cell.outputs[1].text == "reward 1\n" and cell.metadata == {}
    kept = cell.outputs[0].data["image/png"]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(kept))).convert("RGB"))
    assert len(kept) < len(both["image/png"]) / 2
    assert pixels.shape == noise.shape and abs(pixels - noise.astype(float)).mean() < 16


def test_cleaning_refuses_a_warning():
    warning = new_output(
        "stream", name="stderr", text="4/8 images (50%), reward 1.000\n/somewhere/file.py:1: UserWarning: look out\n"
    )
    with pytest.raises(ValueError, match="look out"):
        quickstart.cleaned(notebook_with(warning))
