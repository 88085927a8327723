"""benchmarks/peers: the programs do the same work on a tiny pipeline, and the arithmetic of their comparison."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import allocator
import compare
import earlier
import floor
import native
import pytest
import summary
import torch
import tyro
import workload

from diffusion_gym.storage import write_json

FOLDER = Path(__file__).parents[2] / "benchmarks" / "peers"


@pytest.fixture(autouse=True)
def threads_as_they_were(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)


@pytest.fixture
def small(tiny_pipeline):
    sizes = dict(samples=2, sample_batch=2, train_batch=1, accumulation=2, steps=2, warmup=1, epochs=1)
    return workload.Workload(str(tiny_pipeline), **sizes)


def batches_of_the_unet(monkeypatch):
    """From now on, the batch size of every pass through a UNet."""
    from diffusers import UNet2DConditionModel

    sizes, forward = [], getattr(UNet2DConditionModel.forward, "plain", UNet2DConditionModel.forward)

    def counted(self, sample, *args, **kwargs):
        sizes.append(len(sample))
        return forward(self, sample, *args, **kwargs)

    counted.plain = forward
    monkeypatch.setattr(UNet2DConditionModel, "forward", counted)
    return sizes


@pytest.mark.parametrize("lora", [False, True])
def test_floor_and_native_train_the_same_parameters_in_the_same_passes(small, lora, monkeypatch):
    lines, passes = [], []
    for program in (floor, native):
        sizes = batches_of_the_unet(monkeypatch)
        lines.append(program.measure(replace(small, lora=lora)))
        passes.append(sizes)
    assert lines[0]["trained_parameters"] == lines[1]["trained_parameters"] > 0
    # Two iterations: T forwards of 2 x 2 in a rollout, then 2 x T passes of 2 x 1 transitions.
    assert passes[0] == passes[1] == 2 * ([4] * 2 + [2] * 4)
    for line in lines:
        assert json.loads(json.dumps(line)) == line
        (row,) = line["iterations"]
        assert 0 < row["decode_s"] + row["reward_s"] < row["rollout_s"] and row["train_cpu_s"] > 0
        assert line["peak_rss_mb"] >= line["loaded_rss_mb"] > 100 and line["peak_cuda_mb"] is None


def test_sizes_that_do_not_fit_are_refused(small):
    with pytest.raises(ValueError, match=r"samples=16 must be a multiple of train_batch \* accumulation=6"):
        workload.Workload("x", train_batch=3)
    with pytest.raises(ValueError, match="micro_batch=0 must be at least 1"):
        floor.measure(replace(small, micro_batch=0))


def record(name, iterations, memory, **changed):
    rows = [
        {"rollout_s": 100 * rollout, "train_s": 100 * train, "rollout_cpu_s": rollout, "train_cpu_s": train}
        | {"decode_cpu_s": 0.25, "reward_cpu_s": 0.25}
        for rollout, train in iterations
    ]
    shared = {"samples": 8, "steps": 5, "guidance": 5.0, "precision": "no", "device": "cpu", "threads": 1}
    return {
        "name": name,
        "trainable": "full",
        "workload": {**shared, "warmup": 1, "epochs": len(rows), "pipeline": "small", **changed},
        "iterations": rows,
        "loaded_rss_mb": 60,
        "peak_rss_mb": memory,
        "peak_cuda_mb": None,
        "card": None,
        "processor": "a processor",
        "trained_parameters": 1234,
        "versions": {"torch": "1", **({"trl": "2"} if name == "TRL" else {})},
    }


FLOOR = record("floor", [(2.5, 10), (1.5, 5), (4.5, 20)], 100)
NATIVE = record("diffusion_gym", [(2.9, 11), (1.6, 5.1), (4.5, 20)], 120)  # sampling 2.4 / 2, 1.1 / 1, 4 / 4
TRL = record("TRL", [(4.5, 12), (2.5, 7), (8.5, 23)], 200)


def test_the_page_has_ratios_within_rounds_of_the_records(tmp_path):
    page, records = tmp_path / "speed.md", tmp_path / "records"
    marked = "<!-- speed headline -->\nold\n<!-- /speed headline -->\n<!-- speed -->\nold\n<!-- /speed -->\n"
    page.write_text(f"above\n{marked}below\n")
    for one in (TRL, NATIVE, FLOOR):
        write_json(records / f"{one['name']}.json", one)
    compare.page(compare.PageOptions(records=records, page=page))
    text = page.read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("| diffusion")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:6] == ["2.40", "1.10 (1.00 to 1.20)", "2.90", "11.00", "1.02 (1.00 to 1.10)"]
    assert "- diffusion_gym / TRL: total 0.78 (0.71 to 0.84)" in text and text.endswith("\nbelow\n")
    with pytest.raises(ValueError, match="'TRL' ran with another steps"):
        summary.summary([FLOOR, record("TRL", [(1, 1)] * 3, 1, steps=6)])


TURNS = """
import json, sys
with open(sys.argv[2], "a") as log:
    for _ in range(3):
        print("ready", flush=True)
        sys.stdin.readline()
        log.write(sys.argv[1])
        log.flush()
print(json.dumps({"who": sys.argv[1]}))
"""


def test_programs_take_turns_in_turning_order(tmp_path):
    log = tmp_path / "log"
    commands = {name: [sys.executable, "-c", TURNS, name, str(log)] for name in "abc"}
    assert compare.take_turns(commands, 3) == {name: {"who": name} for name in "abc"}
    assert log.read_text() == "abc" + "cba" + "abc"
    with pytest.raises(SystemExit, match=r"(?s)ended with 1:\n.*no such thing"):
        compare.take_turns({"a": [sys.executable, "-c", "raise RuntimeError('no such thing')"]}, 1)


def test_every_program_gets_the_same_workload(tmp_path, monkeypatch, capsys):
    asked = []

    def take_turns(commands, rounds):
        asked.append(commands)
        return {name: record(name, [(2.5, 10)], 100) for name in commands}

    for script in (compare, allocator):
        monkeypatch.setattr(script, "take_turns", take_turns)
    options = compare.RunOptions(pipeline=tmp_path, trainables=("lora",), rounds=2, steps=7, records=tmp_path)
    compare.run(replace(options, trl=Path("other/python")))
    assert list(asked[0]) == list(compare.PROGRAMS)
    for command in asked[0].values():
        given = tyro.cli(workload.Workload, args=command[2:])
        assert (given.lora, given.steps, given.epochs, given.turns, given.trajectories) == (True, 7, 2, True, 8)
    monkeypatch.setattr(allocator, "small_pipeline", lambda: tmp_path)
    allocator.main(allocator.Options(rounds=3))
    assert asked[1]["given back"] == ["env", "GLIBC_TUNABLES=", *asked[1]["kept"]]
    assert "1.00 (1.00 to 1.00)" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif("DIFFUSION_GYM_TRL" not in os.environ, reason="DIFFUSION_GYM_TRL names the Python of TRL's venv")
@pytest.mark.parametrize("lora", [False, True])
def test_trl_trains_the_same_parameters_in_as_many_updates(tmp_path, lora):
    from diffusion_gym.testing.random_pipeline import write_pipeline

    pipeline = write_pipeline(tmp_path / "small", "small", 0, torch.float32)
    sizes = dict(samples=2, sample_batch=2, train_batch=1, accumulation=1, steps=2, warmup=0, epochs=1)
    flags = [part for name, size in sizes.items() for part in (f"--{name.replace('_', '-')}", str(size))]
    command = [os.environ["DIFFUSION_GYM_TRL"], str(FOLDER / "trl_ddpo.py"), str(pipeline), *flags]
    done = subprocess.run([*command, *(["--lora"] if lora else [])], capture_output=True, text=True, check=True)
    line = json.loads(done.stdout.splitlines()[-1])
    ours = native.measure(workload.Workload(str(pipeline), lora=lora, **sizes))
    assert line["trained_parameters"] == ours["trained_parameters"] and line["updates"] == ours["updates"] == 2


def test_an_earlier_build_does_the_same_work(tmp_path, monkeypatch, capsys):
    """Each build by its own script, and the ratio within a round is of the two's CPU seconds."""
    checkout = tmp_path / "checkout"
    for name in ("diffusion_gym/models", "agents", "wrappers"):  # agents beside the package, as they lay once
        (checkout / name).mkdir(parents=True)
    asked = []

    def turns(commands, rounds):
        asked.append((commands, rounds))
        sources = [Path(command[1].removeprefix("PYTHONPATH=")) for command in commands.values()]
        assert all((source / "diffusion_gym" / "agents").exists() for source in sources)
        seconds = {"earlier": 4.0, "now": 3.0, "now, by torch alone": 5.0}
        return {
            name: {"iterations": [{"rollout_cpu_s": 1.0, "train_cpu_s": seconds[name] - 1}] * 2} for name in commands
        }

    monkeypatch.setattr(earlier, "take_turns", turns)
    earlier.run(earlier.RunOptions(checkout, pipelines=("Shapes",), rounds=2, records=tmp_path / "records"))
    for (commands, rounds), lora in zip(asked, (False, True), strict=True):
        scripts = [Path(command[4]).parent for command in commands.values()]
        assert scripts == [checkout / "benchmarks" / "peers", FOLDER, FOLDER] and rounds == 3
        lines = [command[5:] for command in commands.values()]
        assert lines[0] == lines[1] == lines[2] and ("--lora" in lines[0]) is lora
        workload_of = tyro.cli(workload.Workload, args=[word for word in lines[0] if word != "--turns"])
        assert (workload_of.samples, workload_of.warmup, workload_of.micro_batch) == (32, 1, 64)
        assert [command[2] for command in commands.values()] == [
            f"{earlier.SWITCH}={kind}" for kind in ("torch", "auto", "torch")
        ]
    page = tmp_path / "page.md"
    page.write_text("<!-- earlier -->\n<!-- /earlier -->\n")
    earlier.page(earlier.PageOptions(tmp_path / "records", page))
    row = "1.00 (1.00 to 1.00) | 0.67 (0.67 to 0.67) | 0.75 (0.75 to 0.75) | 1.25 (1.25 to 1.25)"
    assert f"| Shapes | all weights | {row} |" in page.read_text() and row in capsys.readouterr().out
