"""benchmarks/gpu.py on tiny pipelines on a CPU: rows, records, parts, tables; the figures themselves need a GPU."""

import json
from dataclasses import replace

import gpu as script
import gpu_rows
import pytest
import torch

from diffusion_gym.storage import write_json

TINY = {"scale": "tiny", "device": "cpu"}


@pytest.fixture
def options(tmp_path):
    return script.RunOptions(records=tmp_path / "records", work=tmp_path / "work", **TINY)


def part(options, name):
    return script.PartOptions(**{**vars(options), "part": name})


def test_an_iteration_is_measured_and_its_ratios_are_1(tiny_pipeline):
    row = gpu_rows.Row(model=str(tiny_pipeline), batch=2, samples=4, steps=3, dtype="float32", device="cpu")
    found = gpu_rows.measure(row)
    total = found["rollout_seconds"] + found["update_seconds"]
    assert found["images_per_second"] == pytest.approx(4 / total)
    assert found["update_transitions_per_second"] == pytest.approx(4 * 3 / found["update_seconds"])
    assert found["rollout_share"] > 0 and found["update_share"] > 0 and found["ratio_deviation"] <= 1e-6
    assert found["picture"] == [8, 8, 3] and found["peak_memory_gb"] is None


def test_a_policy_that_moved_has_other_ratios(make_env, perturb):
    from diffusion_gym.agents import DenoisingPolicy
    from diffusion_gym.agents.rollout import collect_many

    env = make_env(2)
    policy = DenoisingPolicy.from_env(env)
    trajectories = collect_many(env, policy, 2, (0, 0))
    assert gpu_rows.ratio_deviation(perturb(policy), trajectories, 2) > 1e-4


def test_a_variant_changes_the_layout_alone(tiny_pipeline, monkeypatch):
    applied, apply = [], gpu_rows._apply
    monkeypatch.setattr(gpu_rows, "_apply", lambda variant, unet: applied.append(unet) or apply(variant, unet))
    row = gpu_rows.Row(str(tiny_pipeline), batch=2, samples=2, steps=2, dtype="float32", device="cpu")
    assert gpu_rows.measure(replace(row, variant="channels-last"))["images_per_second"] > 0
    assert applied[0].conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_what_has_a_record_is_not_measured_again(options, monkeypatch, capsys):
    for name in script.rows("models", options):
        write_json(options.records / f"models--{name}.json", {"error": "out of memory"})
    monkeypatch.setattr(script, "measure", None)
    script.measure_rows(part(options, "models"))
    script.run(replace(options, parts=("models",)))
    assert capsys.readouterr().out == ""


def test_a_failure_is_recorded_and_tried_again(options, monkeypatch):
    def broken(row):
        raise RuntimeError("no kernel\nmore")

    monkeypatch.setattr(script, "measure", broken)
    script.measure_rows(part(options, "models"))
    path = options.records / "models--sdxl.json"
    assert json.loads(path.read_text())["error"] == "RuntimeError: no kernel"
    assert not script._is_done(path)
    assert "RuntimeError: no kernel" in script.table("models", options.records)


def test_a_part_runs_in_a_process_of_its_own_and_writes_its_table(options, capfd):
    script.run(replace(options, parts=("tests",)))
    assert "10 of 10 tests" in capfd.readouterr().out
    script.run(replace(options, parts=("models",), seconds=0))
    assert "no time was left" in capfd.readouterr().out


@pytest.mark.slow
def test_everything_runs_end_to_end(options, capfd):
    script.run(options)
    assert "ended with" not in capfd.readouterr().out
    assert all(script.table(name, options.records) for name in script.PARTS)


def test_a_trial_has_records_of_its_own_and_no_page(tmp_path):
    exact = script.RunOptions(work=tmp_path)
    assert exact.folder == script.RECORDS
    assert {replace(exact, scale="tiny").folder, replace(exact, device="cpu").folder}.isdisjoint({script.RECORDS})
    write_json(tmp_path / "tests--tests.json", {"card": "CPU", "tests": 1})
    page = tmp_path / "page.md"
    page.write_text("<!-- gpu -->\n<!-- /gpu -->\n")
    with pytest.raises(SystemExit, match="of a CPU"):
        script.page(script.PageOptions(records=tmp_path, page=page))
    assert page.read_text() == "<!-- gpu -->\n<!-- /gpu -->\n"


@pytest.mark.parametrize("given", [{"device": "cuda"}, {"parts": ("lora", "flux")}])
def test_what_is_not_there_is_refused_before_anything_runs(options, given, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"device='cuda'|flux.*tests, lora"):
        script.run(replace(options, **given))
    assert not options.records.exists()


def test_page_is_made_of_the_records_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- gpu -->\nold\n<!-- /gpu -->\nbelow\n")
    options = script.PageOptions(records=tmp_path / "records", page=page)
    script.page(options)
    assert "Not measured" in page.read_text() and page.read_text().endswith("\nbelow\n")
    row = {"model": "SD 1.4", "trainable": "lora", "dtype": "bfloat16", "steps": 50, "batch": 4, "variant": "plain"}
    figures = {
        "rollout_share": 0.456,
        "update_share": 0.4,
        "rollout_images_per_second": 1.5,
        "update_transitions_per_second": 20.0,
        "images_per_second": 0.75,
        "ratio_deviation": 2e-7,
        "peak_memory_gb": 7.04,
    }
    write_json(options.records / "lora--lora-4.json", {"name": "lora-4", "card": "Some Card", **row, **figures})
    write_json(
        options.records / "lora--lora-64.json", {"name": "lora-64", **row, "batch": 64, "error": "out of memory"}
    )
    demo = {"reward_queries": 6400, "seconds": 61.2, "base_success": 0.35, "success": 0.95, "samples": 256}
    write_json(options.records / "shapes--demo.json", demo)
    script.page(options)
    text = page.read_text()
    assert "Card: Some Card." in text and "old" not in text
    expected = "| SD 1.4 | lora | bfloat16 | 50 | 4 | plain | 1.50 | 46% | 20.0 | 40% | 0.750 | 2.0e-07 | 7.0 |"
    assert expected in text
    assert "| SD 1.4 | lora | bfloat16 | 50 | 64 | plain | out of memory |" in text
    assert "6,400 reward queries, takes 61 s: strict success 0.35 before, 0.95 after" in text


def test_operations_are_those_of_the_matrix_products():
    one, two = torch.randn(3, 5), torch.randn(5, 7, requires_grad=True)
    assert gpu_rows.operations(lambda: one @ two) == 2 * 3 * 5 * 7
    assert gpu_rows.operations(lambda: (one @ two).sum().backward()) == 2 * 2 * 3 * 5 * 7  # one has no gradient
    assert gpu_rows.matrix_rate("cpu", torch.float32) > 1e6
