"""benchmarks/stable_diffusion.py on the tiny pipeline: rows, records, table; the figures themselves need a GPU."""

import json

import pytest
import stable_diffusion as script
import torch

from diffusion_gym.storage import write_json


def test_a_row_is_measured_in_a_process_of_its_own_and_a_failure_recorded(tiny_pipeline, tmp_path):
    common = {"device": "cpu", "dtype": "float32", "steps": 3, "samples": 3, "trainables": ("lora",)}
    script.run(script.RunOptions(model=str(tiny_pipeline), batches=(2,), records=tmp_path, **common))
    script.run(script.RunOptions(model=str(tmp_path / "missing"), batches=(1,), records=tmp_path, **common))
    record = json.loads((tmp_path / "lora-2-Compressibility-plain.json").read_text())
    assert record["samples"] == 4 and record["picture"] == [8, 8, 3] and record["peak_memory_gb"] is None
    total = record["rollout_seconds"] + record["update_seconds"]
    assert record["images_per_second"] == pytest.approx(4 / total)
    assert record["update_transitions_per_second"] == pytest.approx(4 * 3 / record["update_seconds"])
    assert "missing" in json.loads((tmp_path / "lora-1-Compressibility-plain.json").read_text())["error"]


def test_a_variant_changes_the_layout_alone(tiny_pipeline, monkeypatch):
    applied, apply = [], script._apply
    monkeypatch.setattr(script, "_apply", lambda variant, unet: applied.append(unet) or apply(variant, unet))
    options = {"device": "cpu", "dtype": "float32", "steps": 2, "samples": 2, "batch": 2, "variant": "channels-last"}
    record = script.measure(script.Row(model=str(tiny_pipeline), **options))
    assert record["images_per_second"] > 0 and record["rollout_share"] > 0 and record["update_share"] > 0
    assert applied[0].conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_page_is_made_of_the_records_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- gpu -->\nold\n<!-- /gpu -->\nbelow\n")
    options = script.PageOptions(records=tmp_path / "records", page=page)
    script.page(options)
    assert "Not measured" in page.read_text() and page.read_text().endswith("\nbelow\n")
    row = {"trainable": "lora", "batch": 4, "reward": "Compressibility", "variant": "plain", "card": "Some Card"}
    figures = {
        "rollout_share": 0.456,
        "update_share": 0.4,
        "rollout_images_per_second": 1.5,
        "update_transitions_per_second": 20.0,
        "images_per_second": 0.75,
    }
    write_json(tmp_path / "records" / "a.json", {**row, **figures, "peak_memory_gb": 7.04})
    write_json(tmp_path / "records" / "b.json", {**row, "batch": 64, "error": "out of memory"})
    script.page(options)
    text = page.read_text()
    assert (
        "Card: Some Card." in text
        and "| lora | 4 | Compressibility | plain | 1.50 | 46% | 20.0 | 40% | 0.750 | 7.0 |" in text
    )
    assert "| lora | 64 | Compressibility | plain | out of memory |" in text and "old" not in text


def test_operations_are_those_of_the_matrix_products():
    one, two = torch.randn(3, 5), torch.randn(5, 7, requires_grad=True)
    assert script.operations(lambda: one @ two) == 2 * 3 * 5 * 7
    assert script.operations(lambda: (one @ two).sum().backward()) == 2 * 2 * 3 * 5 * 7  # one has no gradient
    assert script.matrix_rate("cpu", torch.float32) > 1e6
