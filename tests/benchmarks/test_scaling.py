"""benchmarks/scaling.py: exponents of known laws, tables of records made by hand, and one value on a tiny pipeline."""

import json
import shutil
import sys
from dataclasses import asdict

import pytest
import scaling
import scaling_page as page
import torch

from diffusion_gym.storage import write_json


@pytest.fixture(autouse=True)
def threads_as_they_were(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_power_law_finds_the_exponent_of_an_exact_law(power):
    sizes = [4, 8, 16, 64]
    exponent, off = page.power_law(sizes, [3 * size**power for size in sizes])
    assert exponent == pytest.approx(power, abs=1e-12) and off == pytest.approx(0, abs=1e-12)


def test_power_law_of_a_fixed_cost_is_below_linear_and_its_distance_is_said():
    assert page.power_law([1, 2, 4], [10 + size for size in (1, 2, 4)])[0] < 0.2
    # ln y = 0, 0, ln 2, ln 2 at ln x = 0, 1, 2, 3 times ln 2: slope 0.4, intercept -0.1 ln 2.
    exponent, off = page.power_law([1, 2, 4, 8], [1, 1, 2, 2])
    assert exponent == pytest.approx(0.4) and off == pytest.approx(2**0.3 - 1)


def test_power_law_refuses_what_has_no_logarithm_or_no_slope():
    for sizes, values in (([1, 2], [0.0, 1.0]), ([2, 2], [1.0, 1.0]), ([1], [1.0])):
        with pytest.raises(ValueError, match="must be positive, and of two sizes"):
            page.power_law(sizes, values)


def _record(axis, size, rollout, update, memory, bare=(), device="cpu", **setting):
    """A record whose second iteration is the faster one; CPU seconds are half the wall seconds."""

    def iterations(rollout, update):
        row = {"rollout_cpu_s": rollout, "update_cpu_s": update, "rollout_s": 2 * rollout, "update_s": 2 * update}
        return [{name: 3 * value for name, value in row.items()}, row]

    names = ("batch", "steps", "side", "prompts", "micro_batch")
    return {
        "axis": axis,
        "size": size,
        "setting": {**dict.fromkeys(names, 4), **setting},
        "workload": {"device": device, "threads": 1, "precision": "no", "warmup": 1, "epochs": 2},
        "iterations": iterations(rollout, update),
        "loaded_rss_mb": 500.0,
        "rollout_peak_rss_mb": 500 + memory / 2,
        "peak_rss_mb": 500.0 + memory,
        "loaded_cuda_mb": 100.0,
        "rollout_peak_cuda_mb": 110.0,
        "peak_cuda_mb": 130.0,
        "card": None if device == "cpu" else "Some Card",
        "bare": iterations(*bare) if bare else [],
        "trained_parameters": 1234,
        "versions": {"torch": "1", "diffusers": "2"},
    }


def _cells(text, start):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_numbers_are_cpu_seconds_on_a_cpu_and_wall_seconds_on_a_gpu():
    found = page.numbers(_record("batch", 4, 1.5, 2.5, 80))
    assert found == {"rollout": 1.5, "update": 2.5, "rollout_memory": 40, "memory": 80}
    found = page.numbers(_record("batch", 4, 1.5, 2.5, 80, bare=(1.0, 2.0), device="cuda"))
    own = {"rollout": 3.0, "update": 5.0, "rollout_memory": 10, "memory": 30}
    assert found == {**own, "bare_rollout": 2.0, "bare_update": 4.0}
    assert page.numbers(_record("batch", 4, 1.5, 2.5, 0))["memory"] == 1.0  # a logarithm needs more than nothing


def test_tables_show_exponents_and_judge_them():
    records = [_record("batch", n, 2 * n, 3 + 1e-9 * n, 10 * n, batch=n) for n in (16, 4, 8)]
    text = page.tables(records)
    assert text.startswith("### Batch, CPU\n\n| trajectories at once | rollout, s | update, s |")
    assert _cells(text, "8") == ["16", "3", "40", "80"]
    assert _cells(text, "**exponent**") == ["**1.00**", "**0.00**", "**1.00**", "**1.00**"]
    assert [line.split(" ")[1] for line in text.splitlines()[4:7]] == ["4", "8", "16"]
    assert "\n\nAt most linear: no exponent is above 1.1.\n\n" in text and "bare UNet" not in text
    assert "With T = 4, latents of 4x4, 4 prompts, 4 transitions in one pass." in text
    assert "On a CPU, threads: 1: 1,234 trained parameters" in text and "torch 1, diffusers 2" in text


def test_more_than_linear_is_said_beside_the_bare_unets_exponent():
    sides = (2, 4, 8)
    records = [_record("latents", s * s, s**2, s**3, s, bare=(s**2, s**2.5), device="cpu", side=s) for s in sides]
    text = page.tables(records)
    assert _cells(text, "**exponent**")[:2] == ["**1.00**", "**1.50**"]
    assert _cells(text, "**exponent**")[4:] == ["**1.00**", "**1.25**"]
    assert "\n\nMore than linear: update (1.50; the bare UNet's 1.25).\n\n" in text


def test_more_than_linear_at_the_end_alone_is_said_too():
    seconds = {1: 8.0, 2: 8.0, 4: 8.0, 8: 32.0}  # the fit's exponent is 0.6, that of the last two sizes 2
    text = page.tables([_record("steps", n, n, value, 10, steps=n) for n, value in seconds.items()])
    assert _cells(text, "**exponent**")[1] == "**0.60**" and _cells(text, "of the last two")[1] == "2.00"
    assert "no exponent is above 1.1. Between the last two sizes more than linear: update (2.00)." in text


def test_micro_batches_are_told_a_transition_by_the_positions_of_a_pass():
    given = {"batch": 16, "steps": 4}
    records = [
        _record("micro-batch", size, 1.0, 0.64 * size, 10, side=side, micro_batch=size, **given)
        for side, size in ((16, 4), (8, 64), (8, 4))
    ]
    rows = [line for line in page.tables(records).splitlines() if line.startswith(("| 8x8", "| 16x16"))]
    assert [row.strip("| ").split(" | ") for row in rows] == [
        ["8x8", "4", "256", "40", "10"],
        ["8x8", "64", "4,096", "640", "10"],
        ["16x16", "4", "1,024", "40", "10"],
    ]


def test_page_is_made_of_the_records_alone(tmp_path):
    page, records = tmp_path / "page.md", tmp_path / "records"
    page.write_text("above\n<!-- scaling -->\nold\n<!-- /scaling -->\nbelow\n")
    options = scaling.PageOptions(records=records, page=page)
    scaling.page(options)
    assert page.read_text() == "above\n<!-- scaling -->\nNot measured yet.\n<!-- /scaling -->\nbelow\n"
    write_json(records / "a.json", _record("prompts", 1, 1.0, 1.0, 10))
    write_json(records / "b.json", _record("prompts", 16, 1.0, 1.0, 10, device="cuda"))
    scaling.page(options)
    text = page.read_text()
    assert "### Distinct prompts, CPU" in text and "### Distinct prompts, CUDA" in text and "On Some Card" in text
    assert text.endswith("\nbelow\n") and "exponent" not in text  # one value has none


def test_a_value_is_measured_on_the_latents_it_asks_for(tiny_pipeline, tmp_path):
    folder = scaling.with_side(tiny_pipeline, tmp_path / "sized", 8)
    setting = scaling.Setting(batch=2, steps=2, side=8, prompts=3, micro_batch=1)
    workload = scaling.Workload(
        str(folder), samples=2, sample_batch=2, train_batch=2, accumulation=1, micro_batch=1, steps=2
    )
    record = scaling.measure("latents", setting, workload)
    assert json.loads(json.dumps(record)) == record
    assert record["size"] == 64 and record["setting"] == asdict(setting) and len(record["iterations"]) == 2
    found = page.numbers(record)
    assert min(found.values()) > 0 and found["memory"] >= found["rollout_memory"]
    assert len(record["bare"]) == 2 and record["peak_cuda_mb"] is None
    assert not scaling.measure("batch", setting, workload)["bare"]


def test_another_side_changes_configs_alone(tiny_pipeline, tmp_path):
    from diffusion_gym.models import load_model

    folder = scaling.with_side(tiny_pipeline, tmp_path / "sized", 12)
    model = load_model(folder, "cpu", "float32")
    assert model.latent_shape[1:] == (12, 12) and model.image_shape == (24, 24, 3)
    assert load_model(tiny_pipeline, "cpu", "float32").latent_shape[1:] == (4, 4)
    (weights,) = (folder / "unet").glob("*.safetensors")
    assert weights.resolve() == (tiny_pipeline / "unet" / weights.name).resolve()


@pytest.mark.slow
def test_run_measures_every_value_in_a_process_of_its_own(tiny_pipeline, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(scaling.AXES, "prompts", (scaling.Setting(2, 1, 4, 3, 2),))
    options = scaling.RunOptions(pipeline=tiny_pipeline, axes=("prompts",), records=tmp_path / "records")
    scaling.run(options)
    (path,) = (tmp_path / "records").iterdir()
    record = json.loads(path.read_text())
    assert path.name == "cpu-prompts-3.json" and record["size"] == 3 and record["workload"]["micro_batch"] == 2
    assert record["workload"]["pipeline"] == tiny_pipeline.name and str(tmp_path) not in path.read_text()
    assert "prompts 3: rollout" in capsys.readouterr().out
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(SystemExit, match=r"prompts, Setting\(batch=2.*\) ended with 1:"):
        scaling.run(options)


def test_every_axis_changes_what_it_is_named_after():
    for axis, settings in scaling.AXES.items():
        sizes = [scaling.size(axis, setting) for setting in settings]
        changed = {key for key in asdict(settings[0]) if len({asdict(setting)[key] for setting in settings}) > 1}
        if axis == "micro-batch":
            assert changed == {"side", "micro_batch"} and len(set(sizes)) * 2 == len(sizes)
        else:
            assert changed == {{"latents": "side"}.get(axis, axis)} and sizes == sorted(set(sizes))
        assert all(setting.batch * setting.steps % setting.micro_batch == 0 for setting in settings)
