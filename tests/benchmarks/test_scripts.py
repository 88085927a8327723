"""The other scripts of benchmarks/: each in a smoke form on a tiny pipeline."""

import json
from dataclasses import asdict

import demo
import gpu
import gpu_rows
import gradient_noise
import layout
import linear_layers
import operations
import pipelines
import pytest
import scaling
import scaling_page
import torch
import true_pictures

from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.config import SamplerConfig
from diffusion_gym.models import load_model
from diffusion_gym.storage import write_json
from diffusion_gym.testing.random_sd14 import SMALL


@pytest.fixture(autouse=True)
def threads_as_they_were(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)


@pytest.fixture
def gpu_options(tmp_path):
    return gpu.RunOptions(records=tmp_path / "records", work=tmp_path / "work", scale="tiny", device="cpu")


@pytest.mark.parametrize("power", [0.0, 0.5, 2.0])
def test_scaling_finds_the_exponent_of_an_exact_law(power):
    exponent, off = scaling_page.power_law([4, 8, 16, 64], [3 * size**power for size in (4, 8, 16, 64)])
    assert exponent == pytest.approx(power, abs=1e-12) and off == pytest.approx(0, abs=1e-12)


def test_scaling_measures_the_latents_it_asks_for_and_writes_its_page(tiny_pipeline, tmp_path):
    folder = scaling.with_side(tiny_pipeline, tmp_path / "sized", 8)
    setting = scaling.Setting(batch=2, steps=2, side=8, prompts=3, micro_batch=1)
    sizes = dict(samples=2, sample_batch=2, train_batch=2, accumulation=1, micro_batch=1, steps=2)
    record = scaling.measure("latents", setting, scaling.Workload(str(folder), **sizes))
    assert json.loads(json.dumps(record)) == record
    assert record["size"] == 64 and record["setting"] == asdict(setting) and len(record["iterations"]) == 2
    page, records = tmp_path / "page.md", tmp_path / "records"
    page.write_text("above\n<!-- scaling -->\nold\n<!-- /scaling -->\nbelow\n")
    for number in (1, 2):
        write_json(records / f"{number}.json", {**record, "size": number * record["size"]})
    scaling.page(scaling.PageOptions(records=records, page=page))
    text = page.read_text()
    assert "**0.00**" in text and "old" not in text and text.endswith("\nbelow\n")  # twice the size, the same seconds


def test_every_axis_of_scaling_changes_what_it_is_named_after():
    for axis, settings in scaling.AXES.items():
        changed = {key for key in asdict(settings[0]) if len({asdict(setting)[key] for setting in settings}) > 1}
        assert changed == ({"side", "micro_batch"} if axis == "micro-batch" else {{"latents": "side"}.get(axis, axis)})
        assert all(setting.batch * setting.steps % setting.micro_batch == 0 for setting in settings)


def test_gpu_measures_an_iteration_whose_ratios_are_1(tiny_pipeline):
    row = gpu_rows.Row(model=str(tiny_pipeline), batch=2, samples=4, steps=3, dtype="float32", device="cpu")
    found = gpu_rows.measure(row)
    assert found["images_per_second"] == pytest.approx(4 / (found["rollout_seconds"] + found["update_seconds"]))
    assert found["rollout_share"] > 0 and found["update_share"] > 0 and found["ratio_deviation"] <= 1e-6


def test_gpu_records_a_failure_and_has_it_on_the_page(gpu_options, monkeypatch):
    def broken(row):
        raise RuntimeError("no kernel\nmore")

    monkeypatch.setattr(gpu, "measure", broken)
    gpu.measure_rows(gpu.PartOptions(**{**vars(gpu_options), "part": "models"}))
    path = gpu_options.records / "models--sdxl.json"
    assert json.loads(path.read_text())["error"] == "RuntimeError: no kernel" and not gpu._is_done(path)
    assert "RuntimeError: no kernel" in gpu.table("models", gpu_options.records)
    page = gpu_options.records / "page.md"
    page.write_text("above\n<!-- gpu -->\nold\n<!-- /gpu -->\nbelow\n")
    gpu.page(gpu.PageOptions(records=gpu_options.records, page=page))
    assert "RuntimeError: no kernel" in page.read_text() and "old" not in page.read_text()


@pytest.mark.slow
def test_gpu_runs_end_to_end(gpu_options, capfd):
    gpu.run(gpu_options)
    assert "ended with" not in capfd.readouterr().out
    assert all(gpu.table(name, gpu_options.records) for name in gpu.PARTS)


def test_the_layouts_differ_and_compute_the_same(tiny_pipeline):
    outputs, models = {}, layout.layouts(str(tiny_pipeline))
    assert (
        models["first"].unet.conv_in.weight.is_contiguous() and not models["last"].unet.conv_in.weight.is_contiguous()
    )
    for name, model in models.items():
        torch.manual_seed(0)
        work = layout.works(model, 2)
        work["training"]()
        outputs[name] = [work["rollout"](), work["decoding"](), model.unet.conv_in.weight.grad]
    torch.testing.assert_close(outputs["first"], outputs["last"], rtol=1e-4, atol=1e-5)


def test_operations_are_counted_as_by_hand():
    """A layer has four products of D x D and two of D x 4 D a token, and attention's two of tokens x D a token."""
    counts = operations.picture(steps=3, widths=SMALL)
    width, tokens = SMALL.text, 77
    products = 4 * width * width + 2 * width * 4 * width + 2 * tokens * width
    assert counts["text encoder, one prompt"] == SMALL.text_layers * tokens * 2 * products
    rollout, _, lora, full = list(counts.values())[1:]
    # Gradients of activations cost a forward pass, those of the weights another; the first layers need no activations'.
    assert 1.9 * rollout < lora < 2.4 * rollout and 2.8 * rollout < full <= 3 * rollout


def test_a_picture_noised_anew_has_the_quieter_gradient_in_the_first_step(capsys):
    gradient_noise.main(gradient_noise.Options(num_inference_steps=3, samples=2))
    _, _, *rows, _ = capsys.readouterr().out.strip().splitlines()
    cells = [[float(cell) for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells] == [0, 1, 2] and cells[0][4] < 0.7
    for _, _, sampled, renoised, ratio in cells:
        assert ratio == pytest.approx(renoised / sampled, rel=0.06)


def test_a_rollout_and_diffusers_take_turns_on_one_pipeline(tiny_pipeline, tmp_path):
    found = pipelines.measure(tiny_pipeline, batch=2, steps=2, rounds=2)
    assert {name: len(turns) for name, turns in found.items()} == {"diffusion_gym": 2, "diffusers": 2}
    assert all(0 < turn["network"] < turn["seconds"] for turns in found.values() for turn in turns)
    page = tmp_path / "page.md"
    page.write_text("<!-- pipelines --><!-- /pipelines -->")
    record = {"family": "SDXL, tiny", "batch": 2, "steps": 2, "turns": found, "processor": "one of ours"}
    write_json(tmp_path / "records" / "one.json", record)
    pipelines.page(pipelines.PageOptions(tmp_path / "records", page))
    assert "| SDXL, tiny | 2 |" in page.read_text() and "T = 2, guidance 3, float32, one of ours" in page.read_text()


def test_true_pictures_train_the_network_and_measure_the_average_of_its_weights(capsys):
    options = true_pictures.Options(pictures=16, batch=8, samples=4)
    true_pictures.main(options)
    before, after = capsys.readouterr().out.splitlines()
    assert before.startswith("before: ") and after.startswith("after 16 true pictures: ")
    model = load_model("Shapes", "cpu", "float32")
    policy = DenoisingPolicy(model, SamplerConfig(num_inference_steps=10, eta=1.0), trainable="full")
    begun = [weight.detach().clone() for weight in policy.trainable_parameters().values()]
    average = true_pictures.train(policy, true_pictures.all_captions("color")[:4], options).average
    for start, mean, end in zip(begun, average, policy.trainable_parameters().values(), strict=True):
        assert not torch.equal(start, end)
        assert (mean - start).abs().max() <= (end - start).abs().max() * 1.2 and not torch.equal(mean, end)


def test_the_demo_beside_an_earlier_build(tmp_path, monkeypatch):
    """An iteration of this build; the earlier one's record is there already."""
    monkeypatch.syspath_prepend(demo.ROOT / "examples")
    records, page = tmp_path / "records", tmp_path / "page.md"
    write_json(records / "earlier-seed-0.json", {})
    demo.run(demo.RunOptions(demo.ROOT, seeds=1, samples=4, total_reward_queries=128, records=records))
    record = json.loads((records / "demo-seed-0.json").read_text())
    assert record["cpu_seconds"] > 1 and record["reward_queries"] == 128 and 0 < record["lightness"][1] < 1
    earlier = {**record, "build": "earlier", "cpu_seconds": 4 * record["cpu_seconds"]}
    write_json(records / "earlier-seed-0.json", earlier)
    page.write_text("<!-- demo cost -->\n<!-- /demo cost -->\n")
    demo.page(demo.PageOptions(records, page))
    assert "demo's: 0.25 (0.25 to 0.25) of the first ones' CPU seconds" in page.read_text()


def test_rates_of_linear_layers_are_printed(monkeypatch, capsys):
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(linear_layers, "SHAPES", ((512, 128, 64),))
    linear_layers.main()
    name, *rates = capsys.readouterr().out.splitlines()[2].strip("| ").split(" | ")
    assert name == "512 x 128 -> 64" and len(rates) == 6 and all(float(rate) > 0 for rate in rates)
