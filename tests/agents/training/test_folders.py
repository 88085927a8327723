"""No command writes into what is not its own, no name leads elsewhere, and no two processes share a folder."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from benchmark_suites import write_record
from diffusion_gym.agents.benchmark.cells import Cell
from diffusion_gym.agents.benchmark.command import made_by_bench
from diffusion_gym.agents.benchmark.results import Results
from diffusion_gym.agents.benchmark.suites import Suite, Task
from diffusion_gym.agents.cli import main
from diffusion_gym.agents.report.benchmark.figures import file_name
from diffusion_gym.agents.training.folders import check_name, check_out, content, holding
from diffusion_gym.agents.training.runs import check_new
from diffusion_gym.storage import read_json, write_json
from forked import Forked

ELSEWHERE = [
    "../x",
    "/etc/x",
    "a/b",
    "..",
    ".",
    "",
    "a\\b",
    ".hidden",
    "a\n",
    "a b",
    "a--b",
    "-a",
    "ü",
    "C:x",
    "x" * 101,
]
_SIZES = "budget = 8\nevaluations = 1\nsamples = 4\nbatch = 4\n"
SUITE = f'description = ""\n{_SIZES}[tasks.{{task}}]\nenv = "E"\nceiling = 1.0\n'
HOLD = """
import sys
from diffusion_gym.agents.training.folders import holding
with holding(__import__("pathlib").Path(sys.argv[1])):
    pass
"""


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["color", "red-star", "ddpo_is", "my.module.Class", "two-passes", "3x", "a+b"])
def test_a_name_is_taken(name):
    assert check_name("task", name) == name
    assert Cell("s", name, name, 0, "out").folder.parts == ("out", "runs", f"{name}--{name}--seed-0")


@pytest.mark.parametrize("name", [*ELSEWHERE, 3, None])
def test_a_name_that_could_lead_elsewhere_is_refused_wherever_it_is_read(name, tmp_path):
    task = Task("E", 1.0)
    for make in (lambda: check_name("task", name), lambda: Cell("s", name, "ddpo_is", 0, "out")):
        with pytest.raises(ValueError, match=rf"^task={re.escape(repr(name))} names files"):
            make()
    write_record(tmp_path, "a", "a", 0, 0.1, 0.2)
    [path] = (tmp_path / "records").iterdir()
    write_json(path, {**read_json(path), "task": name})
    with pytest.raises(ValueError, match=r"seed-0\.json: task[:=]"):
        Results.read(tmp_path, Suite("s", "", {"a": task}, 8, 1, 4))
    if isinstance(name, str) and not {"/", ":"} & set(name) and "--" not in name:
        with pytest.raises(ValueError, match="^figure="):
            file_name(name)


@pytest.mark.parametrize("agent", ["../../x:Y", "/x:Y", ".x:Y", "a\\b", ""])
@pytest.mark.parametrize("seed", [0])
def test_an_agent_that_could_lead_elsewhere_is_refused(agent, seed):
    with pytest.raises(ValueError, match="^agent="):
        Cell("s", "a", agent, seed, "out")


@pytest.mark.parametrize("seed", [-1, "../x", True, 1.0])
def test_a_seed_that_is_no_number_is_refused(seed):
    with pytest.raises(ValueError, match="^seed="):
        Cell("s", "a", "b", seed, "out")


def test_a_suite_file_with_such_a_task_writes_and_removes_nothing(tmp_path, capsys):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "x").write_text("mine")
    (tmp_path / "s.toml").write_text(SUITE.format(task='"../../precious"'))
    before = files(tmp_path)
    assert "task='../../precious' names files" in refused(
        capsys, "bench", "--suite", tmp_path / "s.toml", "--agents", "ddpo_is", "--out", tmp_path / "out"
    )
    assert files(tmp_path) == before


# --- --out -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "held",
    [
        {"pyproject.toml": "[project]\nname = 'mine'\n"},
        {"pyproject.toml": "[project]\n", "runs/a/config.json": "{}"},
        {"smoke.toml": SUITE.format(task="a"), "other.toml": "", "records/x.json": "{}"},
        {"smoke.toml": SUITE.format(task="a"), "thesis.txt": "mine"},
        {"smoke.toml": SUITE.format(task="a"), "logs/a.log": "", "thesis.txt": "mine"},
        {"thesis.txt": "mine"},
        {"records/x.json": "{}"},
    ],
)
def test_bench_takes_only_a_new_folder_or_its_own(tmp_path, capsys, held):
    out = tmp_path / "out"
    for name, text in held.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
    before = files(out)
    error = refused(capsys, "bench", "--suite", "smoke", "--agents", "ddpo_is", "--out", out)
    assert "is not empty and no benchmark of diffusion-gym; choose another --out" in error
    assert files(out) == before


@pytest.mark.parametrize("held", [[], ["logs/a.log"], ["logs/a.log", "runs/a/config.json"], ["records/a.json"]])
def test_bench_takes_what_a_kill_left_of_it_at_any_moment(tmp_path, held):
    for name, text in {"smoke.toml": SUITE.format(task="a"), **dict.fromkeys(held, "")}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    check_out(tmp_path, "benchmark", made_by_bench)


@pytest.mark.parametrize(
    "command", [["bench", "--suite", "smoke"], ["train", "--env", "DiffusionDenoise-Shapes-Color"]]
)
@pytest.mark.parametrize("spelled", [["--out", ""], ["--out="]])
def test_an_empty_out_is_not_the_current_directory(command, spelled, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "out='' names no folder" in refused(capsys, *command, *spelled)
    assert files(tmp_path) == {}


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="no benchmark of diffusion-gym"):
        check_out(tmp_path / "file", "benchmark", lambda folder: True)
    check_out(tmp_path / "new", "benchmark", lambda folder: False)


# --- the lock --------------------------------------------------------------------------------------------------------


def hold(folder):
    with holding(folder):
        print("held", flush=True)
        time.sleep(60)


def holder(folder):
    """A process that holds the folder."""
    process = Forked(lambda: hold(folder), folder.parent, os.environ.copy(), sys.__stderr__)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_held_folder_is_refused_by_every_command_and_says_who_holds_it(tmp_path, capsys):
    out = tmp_path / "out"
    process = holder(out)
    try:
        for arguments in (
            ["bench", "--suite", "smoke", "--agents", "ddpo_is"],
            ["train", "--env", "DiffusionDenoise-Shapes-Color-v0"],
        ):
            error = refused(capsys, *arguments, "--out", out)
            assert re.search(rf"is in use by process {process.pid} on \S+, since 20\d\d-\S+; wait for its end", error)
        assert content(out) == [] and json.loads((out / ".holder.json").read_text())["pid"] == process.pid
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()


def test_a_kill_ends_the_lock(tmp_path):
    process = holder(tmp_path / "out")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert (tmp_path / "out" / ".lock").exists()
    check_new(tmp_path / "out")  # what it left is no run
    with holding(tmp_path / "out"):
        assert json.loads((tmp_path / "out" / ".holder.json").read_text())["pid"] == os.getpid()


def test_a_process_may_hold_a_folder_twice_and_leaves_nothing(tmp_path):
    out = tmp_path / "out"
    with holding(out):
        with holding(out):
            (out / "kept").write_text("x")
        held = subprocess.run([sys.executable, "-c", HOLD, str(out)], capture_output=True, text=True)
        assert held.returncode == 1 and f"is in use by process {os.getpid()}" in held.stderr
    assert os.listdir(out) == ["kept"]
    with holding(tmp_path / "new"):
        time.sleep(0)
    assert not (tmp_path / "new").exists()
