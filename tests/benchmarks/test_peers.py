"""benchmarks/peers: the programs do the same work on a tiny pipeline, and the arithmetic of their comparison."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import allocator
import compare
import floor
import native
import pytest
import summary
import torch
import tyro
import workload

from diffusion_gym.storage import write_json

FOLDER = Path(__file__).parents[2] / "benchmarks" / "peers"


@pytest.fixture
def peers(monkeypatch):
    """The programs by name; the number of threads stays as it was."""
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    return SimpleNamespace(compare=compare, floor=floor, native=native, summary=summary, workload=workload)


@pytest.fixture
def small(peers, tiny_pipeline):
    return peers.workload.Workload(
        str(tiny_pipeline), samples=2, sample_batch=2, train_batch=1, accumulation=2, steps=2, warmup=1, epochs=1
    )


@pytest.mark.parametrize("lora", [False, True])
def test_floor_and_native_train_the_same_parameters_in_the_same_passes(peers, small, lora, monkeypatch):
    workload = replace(small, lora=lora)
    lines, passes = [], []
    for program in (peers.floor, peers.native):
        sizes = _batches_of_the_unet(monkeypatch)
        lines.append(program.measure(workload))
        passes.append(sizes)
    floor, native = lines
    assert floor["trained_parameters"] == native["trained_parameters"] > 0
    # Two iterations: T forwards of 2 x 2 in a rollout, then 2 x T passes of 2 x 1 transitions.
    assert passes[0] == passes[1] == 2 * ([4] * 2 + [2] * 4)
    assert native["updates"] == 1 and native["micro_batch"] == 1
    for line in lines:
        assert json.loads(json.dumps(line)) == line
        (row,) = line["iterations"]
        assert 0 < row["decode_s"] + row["reward_s"] < row["rollout_s"] and row["train_cpu_s"] > 0
        assert line["peak_rss_mb"] >= line["loaded_rss_mb"] > 100 and line["peak_cuda_mb"] is None
        assert line["workload"]["lora"] is lora and line["workload"]["pipeline"] == Path(workload.pipeline).name


def _batches_of_the_unet(monkeypatch):
    """From now on, the batch size of every pass through a UNet."""
    from diffusers import UNet2DConditionModel

    sizes, forward = [], getattr(UNet2DConditionModel.forward, "plain", UNet2DConditionModel.forward)

    def counted(self, sample, *args, **kwargs):
        sizes.append(len(sample))
        return forward(self, sample, *args, **kwargs)

    counted.plain = forward
    monkeypatch.setattr(UNet2DConditionModel, "forward", counted)
    return sizes


def test_floor_splits_an_update_into_micro_batches_as_native_does(peers, small, monkeypatch):
    sizes = _batches_of_the_unet(monkeypatch)
    workload = replace(small, steps=3, micro_batch=4, warmup=0)
    peers.floor.measure(workload)
    split = sizes.copy()
    sizes.clear()
    peers.native.measure(workload)
    assert sizes == split == [4] * 3 + [8, 4]
    with pytest.raises(ValueError, match="micro_batch=0 must be at least 1"):
        peers.floor.measure(replace(small, micro_batch=0))


def test_adapters_of_the_floor_start_as_the_linear_layer_and_add_a_low_rank_product(peers):
    linear = torch.nn.Linear(6, 5)
    layer, x = peers.floor.LowRank(linear, rank=2), torch.randn(3, 6)
    torch.testing.assert_close(layer(x), linear(x), rtol=0, atol=0)
    torch.nn.init.normal_(layer.up.weight)
    weight = linear.weight + layer.up.weight @ layer.down.weight
    torch.testing.assert_close(layer(x), x @ weight.T + linear.bias)


def test_reward_is_that_of_the_environment(peers):
    from diffusion_gym.rewards import make_reward

    images = torch.rand(2, 3, 16, 24)
    expected = make_reward("Compressibility")(images, ["", ""], [{}, {}]).scores
    torch.testing.assert_close(torch.tensor(peers.workload.negative_jpeg_kb(images)), expected)


def test_batches_that_do_not_divide_the_samples_are_refused(peers):
    with pytest.raises(ValueError, match=r"samples=16 must be a multiple of train_batch \* accumulation=6"):
        peers.workload.Workload("x", train_batch=3)
    with pytest.raises(ValueError, match="samples=16 must be a multiple of sample_batch=5"):
        peers.workload.Workload("x", sample_batch=5)


def test_phases_are_summed_within_an_iteration_and_the_warm_up_left_out(peers, small):
    meter = peers.workload.Meter(replace(small, warmup=1, epochs=2))
    meter._now = iter([(float(x), 2.0 * x) for x in (0, 50, 100, 101, 101, 103, 200, 205, 300, 301)]).__next__
    for intervals in (1, 2, 2):
        meter.next_iteration()
        for _ in range(intervals):
            meter.begin("train")
            meter.end("train")
    assert meter.line("name", 1)["iterations"] == [
        {"train_s": (101 - 100) + (103 - 101), "train_cpu_s": 6},
        {"train_s": 5 + 1, "train_cpu_s": 12},
    ]


def _record(name, iterations, memory, device="cpu", **changed):
    shared = {"samples": 8, "steps": 5, "guidance": 5.0, "precision": "no", "device": device, "threads": 1}
    rows = [
        {"rollout_s": 100 * rollout, "train_s": 100 * train, "rollout_cpu_s": rollout, "train_cpu_s": train}
        | ({"decode_cpu_s": 0.25, "reward_cpu_s": 0.25} if device == "cpu" else {})
        for rollout, train in iterations
    ]
    return {
        "name": name,
        "trainable": "full",
        "workload": {**shared, "warmup": 1, "epochs": len(rows), "pipeline": "small", **changed},
        "iterations": rows,
        "loaded_rss_mb": 60,
        "peak_rss_mb": memory,
        "peak_cuda_mb": 10 * memory,
        "trained_parameters": 1234,
        "versions": {"torch": "1", **({"trl": "2"} if name == "TRL" else {})},
    }


FLOOR = _record("floor", [(2.5, 10), (1.5, 5), (4.5, 20)], 100)
NATIVE = _record("diffusion_gym", [(2.9, 11), (1.6, 5.1), (4.5, 20)], 120)  # sampling 2.4 / 2, 1.1 / 1, 4 / 4
TRL = _record("TRL", [(4.5, 12), (2.5, 7), (8.5, 23)], 200)


def test_ratios_are_within_rounds(peers):
    ratio = peers.summary.ratio
    assert ratio(NATIVE, FLOOR, "sampling") == pytest.approx((1.1, 1.0, 1.2))
    assert ratio(NATIVE, FLOOR, "training") == pytest.approx((1.02, 1.0, 1.1))
    assert ratio(NATIVE, TRL, "total") == pytest.approx((24.5 / 31.5, 6.7 / 9.5, 13.9 / 16.5))
    assert ratio(NATIVE, TRL, "memory") == pytest.approx((0.6,) * 3)
    assert ratio(NATIVE, TRL, "work") == pytest.approx((60 / 140,) * 3)
    with pytest.raises(ValueError):
        ratio(NATIVE, _record("TRL", [(1, 1)], 1), "total")


def test_seconds_and_memory_of_a_gpu_are_the_devices(peers):
    (found,) = peers.summary.measures(_record("floor", [(2.5, 10)], 100, device="cuda"))
    assert found == {"sampling": 250, "rollout": 250, "training": 1000, "total": 1250, "memory": 1000, "work": 1000}


def test_unlike_records_are_refused(peers):
    with pytest.raises(ValueError, match="'TRL' ran with another steps"):
        peers.summary.summary([FLOOR, _record("TRL", [(1, 1)] * 3, 1, steps=6)])
    with pytest.raises(ValueError, match="different numbers of parameters"):
        peers.summary.summary([FLOOR, {**TRL, "trained_parameters": 9}])


def test_page_is_made_of_the_records_alone(peers, tmp_path):
    page, records = tmp_path / "speed.md", tmp_path / "records"
    marked = (
        "above\n<!-- speed headline -->\n{}\n<!-- /speed headline -->\n<!-- speed -->\n{}\n<!-- /speed -->\nbelow\n"
    )
    page.write_text(marked.format("old", "old"))
    options = peers.compare.PageOptions(records=records, page=page)
    peers.compare.page(options)
    assert page.read_text() == marked.format("Not measured yet.", "Not measured yet.")
    for record in (TRL, NATIVE, FLOOR):
        write_json(records / f"{record['name']}.json", record)
    peers.compare.page(options)
    text = page.read_text()
    assert text.startswith("above\n") and text.endswith("\nbelow\n") and "old" not in text
    floor, native, trl = [line for line in text.splitlines() if line.startswith(("| floor", "| diffusion", "| TRL"))]
    cells = [cell.strip() for cell in native.strip("|").split("|")]
    assert cells[1:6] == ["2.40", "1.10 (1.00 to 1.20)", "2.90", "11.00", "1.02 (1.00 to 1.10)"]
    assert floor.split("|")[3].strip() == "1.00 (1.00 to 1.00)" and trl.endswith("| 200 | 2.00 | 140 |")
    assert "- diffusion_gym / TRL: total 0.78 (0.71 to 0.84)" in text
    assert "With torch 1; for TRL torch 1, trl 2." in text


def test_the_headline_is_of_the_median_totals(peers):
    names = [name for name in peers.compare.PROGRAMS if "," in name]
    others = [{**FLOOR, "name": name} for name in names]  # whose time is the floor's: 1.00 of each other
    found = peers.summary.headline([FLOOR, NATIVE, TRL, *others])
    (line,) = found.splitlines()
    bare, same = (
        "{:.2f} ({:.2f} to {:.2f})".format(*peers.summary.ratio(NATIVE, other, "total")) for other in (FLOOR, TRL)
    )
    assert f"{bare} times the seconds of the bare UNet work; {same} times TRL's" in line
    one = "1.00 (1.00 to 1.00)"
    assert line.endswith(f"{one} times at its default ones, {one} times at its largest.")


TURNS = """
import json, sys
with open(sys.argv[2], "a") as log:
    for _ in range(3):
        print("ready", flush=True)
        sys.stdin.readline()
        print("chatter")
        log.write(sys.argv[1])
        log.flush()
print(json.dumps({"who": sys.argv[1]}))
"""


def test_programs_take_turns_in_turning_order(peers, tmp_path):
    log = tmp_path / "log"
    commands = {name: [sys.executable, "-c", TURNS, name, str(log)] for name in "abc"}
    assert peers.compare.take_turns(commands, 3) == {name: {"who": name} for name in "abc"}
    assert log.read_text() == "abc" + "cba" + "abc"


def test_a_program_that_fails_is_said_with_its_error(peers):
    commands = {"a": [sys.executable, "-c", "raise RuntimeError('no such thing')"]}
    with pytest.raises(SystemExit, match=r"(?s)ended with 1:\n.*no such thing"):
        peers.compare.take_turns(commands, 1)


def test_run_gives_every_program_the_same_workload(peers, tmp_path, monkeypatch, capsys):
    asked = []

    def take_turns(commands, rounds):
        asked.append((commands, rounds))
        return {name: _record(name, [(2.5, 10)], 100) for name in commands}

    monkeypatch.setattr(peers.compare, "take_turns", take_turns)
    options = peers.compare.RunOptions(pipeline=tmp_path, trainables=("lora",), rounds=2, steps=7, records=tmp_path)
    peers.compare.run(options)
    peers.compare.run(replace(options, trl=Path("other/python")))
    (without, rounds), (commands, _) = asked
    assert rounds == 1 + 2 and list(commands) == list(peers.compare.PROGRAMS) and len(without) == 4
    for command in commands.values():
        workload = tyro.cli(peers.workload.Workload, args=command[2:])
        assert (workload.lora, workload.steps, workload.epochs, workload.turns) == (True, 7, 2, True)
        assert workload.trajectories == 8
        assert command[0] == ("other/python" if command[1].endswith("trl_ddpo.py") else sys.executable)
    assert len(list(tmp_path.glob("cpu-lora-*.json"))) == 7 and "| floor |" in capsys.readouterr().out


def test_kept_memory_is_compared_with_the_same_program(peers, tmp_path, monkeypatch, capsys):
    asked = []

    def turns(commands, rounds):
        asked.append((commands, rounds))
        return {"kept": NATIVE, "given back": TRL}

    monkeypatch.setattr(allocator, "take_turns", turns)
    monkeypatch.setattr(allocator, "small_pipeline", lambda: tmp_path)
    allocator.main(allocator.Options(rounds=3))
    ((commands, rounds), _) = asked
    assert rounds == 1 + 3 and commands["given back"] == ["env", "GLIBC_TUNABLES=", *commands["kept"]]
    workload = tyro.cli(peers.workload.Workload, args=commands["kept"][2:])
    assert (workload.epochs, workload.turns, workload.micro_batch, workload.lora) == (3, True, 64, False)
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 2 and all(row.endswith("| 0.78 (0.71 to 0.84) | 0.60 (0.60 to 0.60) |") for row in rows)


@pytest.mark.slow
@pytest.mark.skipif("DIFFUSION_GYM_TRL" not in os.environ, reason="DIFFUSION_GYM_TRL names the Python of TRL's venv")
@pytest.mark.parametrize("lora", [False, True])
def test_trl_trains_the_same_parameters_in_as_many_updates(peers, tmp_path, lora):
    from diffusion_gym.testing.random_pipeline import write_pipeline

    pipeline = write_pipeline(tmp_path / "small", "small", 0, torch.float32)
    flags = "--samples 2 --sample-batch 2 --train-batch 1 --accumulation 1 --steps 2 --warmup 0 --epochs 1".split()
    command = [os.environ["DIFFUSION_GYM_TRL"], str(FOLDER / "trl_ddpo.py"), str(pipeline), *flags]
    done = subprocess.run([*command, *(["--lora"] if lora else [])], capture_output=True, text=True, check=True)
    line = json.loads(done.stdout.splitlines()[-1])
    native = peers.native.measure(
        peers.workload.Workload(
            str(pipeline),
            samples=2,
            sample_batch=2,
            train_batch=1,
            accumulation=1,
            steps=2,
            warmup=0,
            epochs=1,
            lora=lora,
        )
    )
    assert line["trained_parameters"] == native["trained_parameters"] and line["updates"] == native["updates"] == 2
    assert line["versions"]["trl"].startswith("0.")
