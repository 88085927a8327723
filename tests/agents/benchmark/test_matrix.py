"""The matrix: its order, its processes, what becomes of one that dies, and Ray."""

import json
import multiprocessing
import os
import subprocess
import sys
import time

import pytest

from diffusion_gym.agents.benchmark import cells, matrix
from diffusion_gym.agents.benchmark.matrix import cells_of, run_local, run_ray
from diffusion_gym.storage import read_json, write_json


def test_seeds_are_outermost(tiny_suite, tmp_path):
    found = cells_of(str(tiny_suite), ["ddpo_is", "rwr", "ddpo_is"], 2, tmp_path, budget=4, threads=2)
    assert [(cell.seed, cell.task, cell.agent) for cell in found] == [
        (0, "size", "ddpo_is"), (0, "size", "rwr"), (1, "size", "ddpo_is"), (1, "size", "rwr")
    ]  # fmt: skip
    assert {(cell.budget, cell.threads, cell.out) for cell in found} == {(4, 2, str(tmp_path))}
    assert len({cell.name for cell in found}) == 4


@pytest.fixture
def children(monkeypatch):
    """`children[seed] = code`: what the process of the cell of that seed runs, in place of a training."""
    found, started = {}, []

    def start(cell):
        text = json.dumps({**cell.about, "error": "its own"})
        code = f"import sys, time; from pathlib import Path; record, text = Path({str(cell.record)!r}), {text!r}\n"
        code += found[cell.seed]
        process = subprocess.Popen([sys.executable, "-S", "-c", code], stdin=subprocess.PIPE)
        started.append(process)
        return process

    monkeypatch.setattr(matrix, "_start", start)
    return found, started


WRITE = "record.parent.mkdir(exist_ok=True, parents=True); record.write_text(text)"


def test_a_process_that_dies_leaves_a_record_and_others_go_on(cell, children):
    code, _ = children
    code |= {0: "import os; os.kill(os.getpid(), 9)", 1: WRITE, 2: "sys.exit(3)"}
    write_json(cell(seed=2).record, {"error": "of yesterday"})
    told = {}
    run_local([cell(seed=seed) for seed in range(3)], 2, lambda of, record: told.update({of.seed: record}))
    assert told == {seed: read_json(cell(seed=seed).record) for seed in range(3)}
    assert told[0]["error"].startswith("the process ended with exit code -9 and no record; see ")
    assert told[0]["error"].endswith("logs/size--ddpo_is--seed-0.log")
    assert (told[0]["agent"], told[0]["task"], told[0]["seed"]) == ("ddpo_is", "size", 0)
    assert told[1]["error"] == "its own" and "exit code 3" in told[2]["error"]


def test_a_cell_has_a_process_of_its_own_that_imports_nothing_from_here(cell, tmp_path, monkeypatch):
    """One of an agent that is unknown: it ends once the libraries are there, but for those that load models."""
    (tmp_path / "torch.py").write_text("raise ImportError('of the current directory')\n")
    monkeypatch.chdir(tmp_path)
    told = []
    run_local([cell("nobody")], 1, lambda of, record: told.append(record))
    assert told == [read_json(cell("nobody").record)] and told[0]["versions"]["torch"]
    assert told[0]["error"].startswith("ValueError: agent='nobody' is unknown"), told


def test_no_more_processes_than_jobs(cell, children, tmp_path):
    code, started = children
    code |= {seed: f"time.sleep(0.3); {WRITE}" for seed in range(5)}
    most = []
    run_local(
        [cell(seed=seed) for seed in range(5)],
        2,
        lambda of, record: most.append(sum(process.poll() is None for process in started)),
    )
    assert len(started) == 5 and max(most) <= 2


def test_ctrl_c_ends_the_processes_and_leaves_no_record_of_failure(cell, children):
    code, started = children
    code |= {0: WRITE, 1: "time.sleep(600)", 2: "time.sleep(600)"}

    def interrupt(of, record):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_local([cell(seed=seed) for seed in range(3)], 2, interrupt)
    assert len(started) >= 2 and all(process.poll() is not None for process in started)
    assert not cell(seed=1).record.exists() and not cell(seed=2).record.exists()


def test_a_process_ends_with_its_parent(cell):
    """When the pipe from the parent closes, as it does when that is killed, a training in progress ends."""
    reading, writing = os.pipe()

    def child():
        os.close(writing)
        sys.stdin = os.fdopen(reading)
        cells.run_cell = lambda cell: time.sleep(600)
        cells.main(['{"suite": "s", "task": "t", "agent": "a", "seed": 0, "out": "o"}', "--end-with-parent"])

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    time.sleep(0.3)
    assert process.is_alive()
    os.close(writing)
    process.join(60)
    assert process.exitcode == 1
    os.close(reading)


def test_ray_that_is_missing_is_told(monkeypatch):
    monkeypatch.setattr("diffusion_gym.agents.benchmark.library_agents.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"engine='ray' needs ray; pip install 'diffusion-denoise-gym\[ray\]'"):
        run_ray([], None, 0, print)


@pytest.mark.slow
def test_ray_runs_a_matrix_on_two_workers(cell, tmp_path, monkeypatch, without_clocks):
    """A good cell, one that fails, and one whose worker is killed; the good record is that of this process."""
    ray = pytest.importorskip("ray")
    (tmp_path / "dying_agent.py").write_text(
        "import os, signal\nfrom diffusion_gym.agents.algorithms import DDPOIS\n\n\n"
        "class Dying(DDPOIS):\n    def update(self, *args):\n        os.kill(os.getpid(), signal.SIGKILL)\n\n\n"
        "class Failing(DDPOIS):\n    def update(self, *args):\n        raise OSError('no disk')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    told = {}
    agents = ["ddpo_is", "dying_agent:Dying", "dying_agent:Failing", "rwr"]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        run_ray([cell(agent) for agent in agents], None, 0, lambda of, record: told.update({of.agent: record}))
        assert ray.is_initialized()  # it was not ours to end
    finally:
        ray.shutdown()
    assert set(told) == set(agents)
    assert told["dying_agent:Dying"]["error"].startswith("WorkerCrashedError")
    assert told["dying_agent:Failing"]["error"] == "OSError: no disk" and "points" in told["rwr"]
    assert without_clocks(told["ddpo_is"]) == without_clocks(cells.run_cell(cell(threads=1)))
