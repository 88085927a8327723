"""A cell of the matrix: what it records, that it goes on where it was killed, and what it refuses."""

import json
import multiprocessing
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffusion_gym.agents.algorithms import DDPOIS
from diffusion_gym.agents.benchmark.cells import Cell, run_cell
from diffusion_gym.agents.benchmark.measures import Evaluator
from diffusion_gym.agents.benchmark.records import FORMAT
from diffusion_gym.agents.training.runs import evaluate_run
from diffusion_gym.storage import load_tensors, read_json, tensors_metadata
from diffusion_gym.testing.random_ddpm import write_random_ddpm

STEPS, SAMPLES = 3, 4


@pytest.fixture(scope="module")
def whole(tiny_suite, tmp_path_factory):
    """A cell that has run, and its record."""
    done = Cell(str(tiny_suite), "size", "ddpo_is", 0, str(tmp_path_factory.mktemp("whole") / "out"))
    return done, run_cell(done)


@pytest.fixture
def trained(whole, cell):
    """The record of `cell()`, which has run."""
    shutil.copytree(whole[0].out, cell().out)
    return whole[1]


def test_the_record_of_a_training(cell, trained):
    found = trained
    assert read_json(cell().record) == found and "error" not in found
    expected = {"format": FORMAT, "suite": "tiny", "task": "size", "agent": "ddpo_is", "trained": "ddpo_is", "seed": 0}
    assert {key: found[key] for key in expected} == expected and found["threads"] == 1
    assert {"python", "torch", "diffusers"} <= set(found["versions"]) and found["hardware"]["cores"] == os.cpu_count()
    assert found["settings"]["agent_options"]["learning_rate"] == 1e-3 and found["peak_memory_mb"] > 100
    points = found["points"]
    assert [point["reward_queries"] for point in points] == [0, 4, 8]
    # An iteration samples 4 trajectories, then takes their steps once more through the network, with either branch.
    assert [point["network_evaluations"] for point in points] == [0, *(n * 4 * STEPS * 2 * 2 for n in (1, 2))]
    assert points[0]["kl"] == 0 and points[2]["kl"] > 0 and points[0]["seconds"] == 0 < points[1]["seconds"]
    for point in points:
        assert point["probe"] == pytest.approx(-point["reward"], rel=1e-6)  # kB of the same pictures
        assert 1 <= point["all_vendi"] <= SAMPLES and "held_out_reward" in point
    assert str(cell().folder.parent.parent) not in json.dumps(found)  # nothing of the machine's folders


def test_what_the_report_shows(cell, trained):
    for point in trained["points"]:
        path = cell().folder / "points" / f"{point['reward_queries']:08d}.safetensors"
        stored, prompts = load_tensors(path), json.loads(tensors_metadata(path)["prompts"])
        assert stored["images"].shape == (SAMPLES, 8, 8, 3) and stored["images"].dtype == torch.uint8
        assert stored["path_images"].shape == (STEPS + 1, SAMPLES, 8, 8, 3)
        assert stored["path_rewards"].shape == (STEPS + 1, SAMPLES) and len(stored["features"]) == SAMPLES
        assert len(prompts) == SAMPLES and stored["rewards"].mean() == pytest.approx(point["reward"], rel=1e-6)


def test_the_run_folder_is_one_of_train(cell, trained):
    """`diffusion-gym eval` reads it."""
    result = evaluate_run(cell().folder, 4, 0)
    assert result["reward_queries"] == 8 and result["kl_to_base"] > 0


def test_agents_of_a_seed_begin_from_the_same_point(cell, whole):
    first, second = whole[1]["points"][0], run_cell(cell("ddpo_sf"))["points"][0]
    assert {k: v for k, v in first.items() if "seconds" not in k} == {
        k: v for k, v in second.items() if "seconds" not in k
    }
    assert run_cell(cell("ddpo_is", 1))["points"][0]["reward"] != first["reward"]


def test_a_variant_of_the_suite(cell, whole):
    found = run_cell(cell("frozen_null"))
    assert found["agent"] == "frozen_null" and found["trained"] == "ddpo_is"
    assert found["settings"]["agent_options"]["cfg_training"] is False
    assert found["points"][-1]["kl"] != whole[1]["points"][-1]["kl"]


def test_an_agent_of_the_users_own(cell, whole, tmp_path, monkeypatch):
    (tmp_path / "bench_agent.py").write_text(
        "from diffusion_gym.agents.algorithms import DDPOIS\n\n\nclass Mine(DDPOIS):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = run_cell(cell("bench_agent:Mine"))
    assert found["agent"] == "bench_agent:Mine" and found["points"][-1]["reward_queries"] == 8
    assert found["points"][-1]["kl"] == whole[1]["points"][-1]["kl"]
    assert cell("bench_agent:Mine").record.name == "size--bench_agent.Mine--seed-0.json"


def killed(cell, owner, name, call):
    """Run the cell in a fork of this process, which is killed as it calls `owner.name` for the `call`-th time."""

    def child():
        original, calls = getattr(owner, name), []

        def counted(*args):
            calls.append(1)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args)

        setattr(owner, name, counted)
        run_cell(cell)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("owner", "name", "call", "measured"),
    [
        (Evaluator, "measure", 1, []),
        (Evaluator, "measure", 2, [0]),  # the first checkpoint is there, what it measures is not
        (DDPOIS, "update", 2, [0, 4]),
        (Evaluator, "measure", 3, [0, 4]),
    ],
)
def test_a_killed_cell_goes_on_to_the_same_record(
    cell, whole, without_clocks, monkeypatch, owner, name, call, measured
):
    killed(cell(), owner, name, call)
    assert not cell().record.exists()
    stored = cell().folder / "points.json"
    before = read_json(stored) if stored.exists() else []
    assert [point["reward_queries"] for point in before] == measured
    sampled, sample = [], DDPOIS.sample
    monkeypatch.setattr(DDPOIS, "sample", lambda self, *args: sampled.append(1) or sample(self, *args))
    found = run_cell(cell())
    assert len(sampled) == 2 - max(0, len(before) - 1)  # what was measured is not trained again
    assert found["points"][: len(before)] == before
    assert without_clocks(found) == without_clocks(whole[1])


def test_a_training_that_cannot_go_on_begins_anew(cell, trained, without_clocks):
    for path in (cell().folder / "checkpoints").iterdir():
        path.unlink()
    (cell().folder / "points.json").write_text(json.dumps(trained["points"][:2]))
    assert without_clocks(run_cell(cell())) == without_clocks(trained)


def test_finished(cell, whole):
    done, _ = whole
    assert not cell().finished() and done.finished() and replace(done, threads=2).finished()
    assert not replace(done, agent="rwr").finished()


@pytest.mark.parametrize("stored", ["record", "run folder"])
def test_other_settings_in_the_same_folder_are_refused(cell, trained, stored):
    if stored == "run folder":
        cell().record.unlink()
    with pytest.raises(ValueError, match=r"is of other settings \(total_reward_queries=12, there 8\); remove it or"):
        replace(cell(), budget=12).finished()


def test_a_failure_is_recorded(cell, tmp_path):
    """What is wrong with the reward is known only when it is called."""
    path = tmp_path / "tiny.toml"
    path.write_text(Path(cell().suite).read_text().replace('"Incompressibility"', '"json:loads"'))
    broken = replace(cell(), suite=str(path))
    found = run_cell(broken)
    assert found["error"].startswith("RewardError: reward='loads' raised TypeError")
    assert found["traceback"] and found == read_json(broken.record) and "points" not in found
    assert found["versions"] and found["settings"]["env_options"]["reward"] == "json:loads"
    assert not broken.finished()


def test_a_task_that_is_judged_on_held_out_prompts_needs_some(cell, tmp_path):
    text = Path(cell().suite).read_text().replace('"shapes-color-4"', '"unconditional"')
    (tmp_path / "tiny.toml").write_text(text + 'judged_on = "held_out_reward"\n')
    found = run_cell(replace(cell(), suite=str(tmp_path / "tiny.toml")))
    assert found["error"].startswith("ValueError: judged_on='held_out_reward' of the task 'size': its prompts, 'uncond")


@pytest.mark.parametrize("place", ["reward", "probe"])
@pytest.mark.parametrize(
    "act, reason",
    [
        ("raise SystemExit(3)", "reward='act' raised SystemExit: 3 "),
        ("raise BaseException('all')", "reward='act' raised BaseException: all "),
        ("threading.Event().wait(5)", "reward='act': the reward has not returned for "),
    ],
)
def test_a_reward_that_exits_or_hangs_is_a_failure_too(cell, tmp_path, monkeypatch, place, act, reason):
    (tmp_path / "exiting.py").write_text(f"import threading\n\n\ndef act(images, prompts, metadata):\n    {act}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "exiting", raising=False)
    text, path = Path(cell().suite).read_text(), tmp_path / "tiny.toml"
    text = text.replace({"reward": '"Incompressibility"', "probe": '"Compressibility"'}[place], '"exiting:act"')
    path.write_text(text.replace("env_options = {", "env_options = { reward_seconds = 1.0,"))
    found = run_cell(replace(cell(), suite=str(path)))
    assert found["error"].startswith(f"RewardError: {reason}") and "points" not in found


def test_an_agent_that_exits_is_a_failure_too(cell, monkeypatch):
    def leave(*given):
        raise SystemExit(3)

    monkeypatch.setattr(DDPOIS, "update", leave)
    found = run_cell(cell())
    assert found["error"] == "SystemExit: 3" and read_json(cell().record) == found and not cell().finished()


def test_an_unconditional_model(cell, tmp_path, tiny_pipeline):
    """As in the suite `thesis`: no prompts, so nothing is held out and diversity is that of all pictures."""
    model = write_random_ddpm(tmp_path / "ddpm", 0, size="tiny")
    text = Path(cell().suite).read_text().replace(', prompts = ["shapes-color-4"]', "")
    text = text.replace("guidance_scale = 2.0", "guidance_scale = 1.0").replace(str(tiny_pipeline), str(model))
    path = tmp_path / "tiny.toml"
    path.write_text(text)
    found = run_cell(replace(cell(), suite=str(path)))
    assert "error" not in found, found
    last = found["points"][-1]
    assert last["vendi"] == last["all_vendi"] and last["kl"] > 0 and "held_out_reward" not in last
    assert last["network_evaluations"] == 2 * 4 * (STEPS + STEPS - 1)  # the last step is deterministic: not trained
