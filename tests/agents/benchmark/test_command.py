"""The command `bench`: from the command line to the summary, and its mistakes."""

import os
import re
import shlex
import signal
from pathlib import Path

import pytest
import torch
import tyro

from benchmark_suites import write_suite
from diffusion_gym.agents import cli
from diffusion_gym.agents.algorithms import AGENTS
from diffusion_gym.agents.benchmark import command, matrix
from diffusion_gym.agents.benchmark.cells import Cell, run_cell
from diffusion_gym.agents.benchmark.results import Results
from diffusion_gym.agents.benchmark.suites import Suite
from diffusion_gym.storage import read_json, write_json

DOCS = Path(__file__).parents[3] / "docs" / "benchmark.md"


@pytest.fixture
def in_this_process(monkeypatch):
    """Run the cells here, one after the other, in place of processes; the list of what ran."""
    ran = []

    def run(cells, jobs, told):
        for cell in cells:
            ran.append(cell)
            told(cell, run_cell(cell))

    monkeypatch.setattr(command, "run_local", run)
    return ran


def bench(*arguments):
    trust = ["--trust"] if "--suite" in arguments else []  # the suites of these tests name a folder as the model
    cli.main(["bench", *map(str, arguments), *trust])


def failure(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        bench(*arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_a_benchmark_from_the_command_line(tiny_suite, tmp_path, capsys, in_this_process):
    """Done twice, nothing runs again; test_matrix.py has the processes of their own."""
    out = tmp_path / "out"
    arguments = ("--suite", tiny_suite, "--agents", "ddpo_is", "--seeds", 1, "--out", out)
    bench(*arguments)
    told = capsys.readouterr().out
    assert "1 run of 8 reward queries, 0 finished before; the first that ends tells how long they take" in told
    assert f"Next: diffusion-gym report {out}" in told
    assert re.search(r"1/1 size, ddpo_is, seed 0: reward 0\.\d+ -> 0\.\d+, 0\.\d minutes", told)
    assert read_json(out / "summary.json")["agents"]["ddpo_is"]["runs"] == 1 and (out / "points.csv").is_file()
    assert (out / "tiny.toml").read_text() == tiny_suite.read_text()
    stamp = next((out / "records").iterdir()).stat().st_mtime_ns
    bench(*arguments)
    assert "1 run of 8 reward queries, 1 finished before; records" in capsys.readouterr().out
    assert next((out / "records").iterdir()).stat().st_mtime_ns == stamp and len(in_this_process) == 1
    assert Results.read(out).agents == ["ddpo_is"]


def test_a_failed_run_is_told_and_tried_again(tiny_suite, tmp_path, capsys, in_this_process, monkeypatch):
    out = tmp_path / "out"
    arguments = ("--suite", tiny_suite, "--agents", "ddpo_is,module_b:Failing", "--seeds", 1, "--out", out)
    module = tmp_path / "module_b.py"
    module.write_text(
        "from diffusion_gym.agents.algorithms import DDPOIS\n\n\n"
        "class Failing(DDPOIS):\n    broken = True\n\n    def update(self, *args):\n"
        "        if self.broken:\n            raise OSError('no disk')\n        return super().update(*args)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        bench(*arguments)
    told = capsys.readouterr()
    assert stopped.value.code == 1 and "1 runs failed; the same command tries them again" in told.err
    assert "2/2 size, module_b:Failing, seed 0: failed: OSError: no disk" in told.out
    assert read_json(out / "summary.json")["failures"][0]["error"] == "OSError: no disk"
    import module_b

    monkeypatch.setattr(module_b.Failing, "broken", False)
    in_this_process.clear()
    bench(*arguments)
    assert "2/2 size, module_b:Failing, seed 0: reward" in capsys.readouterr().out  # counted from the finished one
    assert [cell.agent for cell in in_this_process] == ["module_b:Failing"]
    assert read_json(out / "summary.json")["failures"] == []


def test_by_default_the_variants_of_the_suite(tiny_suite, tmp_path, in_this_process):
    bench("--suite", tiny_suite, "--seeds", 1, "--budget", 4, "--out", tmp_path / "out")
    assert [(cell.agent, cell.budget) for cell in in_this_process] == [("frozen_null", 4)]


def test_ctrl_c(tiny_suite, tmp_path, capsys, monkeypatch):
    def interrupted(cells, jobs, told):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run_local", interrupted)
    with pytest.raises(SystemExit) as stopped:
        bench("--suite", tiny_suite, "--out", tmp_path / "out")
    assert stopped.value.code == 130 and "the same command goes on" in capsys.readouterr().err


def test_the_list_of_suites(capsys):
    bench("--list")
    told = capsys.readouterr().out
    for name in ("shapes-v1", "ddpo-paper", "thesis", "dpok", "smoke"):
        assert re.search(rf"^{name} +\w", told, flags=re.M)
    assert "1920 reward queries a run; tasks: color, count, composition" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--suite", "shapes-v11"), "suite='shapes-v11' is unknown; did you mean 'shapes-v1'"),
        (("--suite", "smoke", "--agents", "dpokk"), "agent='dpokk' is unknown; did you mean 'dpok'"),
        (("--suite", "smoke", "--agents", ","), "agents is empty"),
        (("--suite", "smoke", "--seeds", 0), "seeds=0 must be at least 1"),
        (("--suite", "smoke", "--budget", 0), "budget=0 must be at least 1"),
        (("--suite", "smoke", "--budget", 3), "budget=3 is below one iteration, samples_per_iteration=16"),
        (("--suite", "smoke", "--jobs", 0), "jobs=0 must be at least 1"),
        (("--suite", "smoke", "--device", "cudda"), "device='cudda' is unknown; use 'cpu'"),
        (("--suite", "smoke", "--device", "cuda"), "device='cuda' is not available here"),
        (("--suite", "dpok"), "device='cuda' is not available here"),
    ],
)
def test_a_mistake_leaves_nothing_behind(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(matrix, "_start", lambda cell: pytest.fail("something ran"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert failure(capsys, *arguments, "--out", tmp_path / "out").startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"env": '"DiffusionDenoise-Shapes-Colour-v0"'},
            "task 'size': env='DiffusionDenoise-Shapes-Colour-v0' is unknown",
        ),
        ({"probe": '"Incompresibility"'}, "task 'size': probe='Incompresibility' is unknown; did you mean 'Incompress"),
        (
            {"env_options": '{ prompts = ["a dog"] }', "probe": '"Compressibility"\njudged_on = "held_out_reward"'},
            "judged_on='held_out_reward' of the task 'size': its prompts, 'custom', have none that are held out",
        ),
    ],
)
def test_a_task_of_what_does_not_exist_is_refused_before_anything_runs(
    tiny_pipeline, tmp_path, capsys, in_this_process, changed, message
):
    suite = write_suite(tmp_path, tiny_pipeline, **changed)
    assert message in failure(capsys, "--suite", suite, "--agents", "ddpo_is", "--out", tmp_path / "out")
    assert not in_this_process and not (tmp_path / "out").exists()


def test_a_folder_of_failures_alone_takes_a_mended_suite(tiny_suite, tiny_pipeline, tmp_path, monkeypatch):
    def failing(cells, jobs, told):
        for cell in cells:
            write_json(cell.record, {**cell.about, "error": "RuntimeError: no luck", "total_seconds": 1.0})
            told(cell, read_json(cell.record))

    monkeypatch.setattr(command, "run_local", failing)
    arguments = ("--agents", "ddpo_is", "--seeds", 1, "--out", tmp_path / "out")
    with pytest.raises(SystemExit) as stopped:
        bench("--suite", tiny_suite, *arguments)
    assert stopped.value.code == 1
    mended = write_suite(tmp_path / "mended", tiny_pipeline, samples="8")
    with pytest.raises(SystemExit) as stopped:
        bench("--suite", mended, *arguments)
    assert stopped.value.code == 1 and (tmp_path / "out" / "tiny.toml").read_text() == mended.read_text()


def test_another_suite_or_other_settings_in_the_same_folder(
    tiny_suite, tiny_pipeline, tmp_path, capsys, in_this_process
):
    out = tmp_path / "out"
    bench("--suite", tiny_suite, "--agents", "ddpo_is", "--seeds", 1, "--out", out)
    assert "holds a benchmark of another suite, tiny.toml" in failure(capsys, "--suite", "smoke", "--out", out)
    changed = write_suite(tmp_path / "changed", tiny_pipeline, samples="8")
    told = failure(capsys, "--suite", changed, "--out", out)
    assert "of another suite, tiny.toml; choose another --out" in told and "It differs in samples. If" in told
    rescaled = write_suite(tmp_path / "rescaled", tiny_pipeline, ceiling="3.5")
    bench("--suite", rescaled, "--agents", "ddpo_is", "--seeds", 1, "--out", out)
    assert (out / "tiny.toml").read_text() == rescaled.read_text()  # a ceiling is only a scale
    held_out = write_suite(tmp_path / "held-out", tiny_pipeline, 'judged_on = "held_out_reward"\n')
    capsys.readouterr()
    bench("--suite", held_out, "--agents", "ddpo_is", "--seeds", 1, "--out", out)
    assert (out / "tiny.toml").read_text() == held_out.read_text()
    assert "on held-out prompts: size" in capsys.readouterr().out
    record = next((out / "records").glob("*.json"))
    content = read_json(record)
    for point in content["points"]:
        del point["held_out_reward"]
    write_json(record, content)
    told = failure(capsys, "--suite", held_out, "--agents", "ddpo_is", "--out", out)
    assert told.startswith("error: task 'size': judged_on='held_out_reward' is not in the record of ddpo_is, seed 0")
    arguments = ("--suite", tiny_suite, "--agents", "ddpo_is", "--budget", 12, "--out", out)
    assert "is of other settings (total_reward_queries=12, there 8)" in failure(capsys, *arguments)
    assert len(in_this_process) == 1


def test_tasks_and_agents_may_join_a_suite(tiny_suite, tiny_pipeline, tmp_path, capsys, in_this_process):
    """What was measured stays as it is, and what was not may change."""
    out = tmp_path / "out"
    text = tiny_suite.read_text()
    task = text[text.index("[tasks.size]") :].replace("[tasks.size]", "[tasks.again]")
    variant = '\n[agents.slow]\nagent = "ddpo_is"\nlearning_rate = 1e-5\n'

    def grown(name, more):
        return write_suite(tmp_path / name, tiny_pipeline, more)

    def run(suite, agents):
        return "--suite", suite, "--agents", agents, "--seeds", 1, "--out", out

    bench(*run(grown("first", variant), "ddpo_is"))
    faster = variant.replace("1e-5", "1e-4")
    bench(*run(grown("second", faster + task), "ddpo_is,slow"))
    names = [cell.name for cell in in_this_process]
    assert sorted(names) == sorted(
        ["size--ddpo_is--seed-0", "size--slow--seed-0", "again--ddpo_is--seed-0", "again--slow--seed-0"]
    )
    rates = [read_json(cell.record)["settings"]["agent_options"]["learning_rate"] for cell in in_this_process]
    assert rates[names.index("size--slow--seed-0")] == 1e-4
    for changed in (grown("third", variant + task), grown("fourth", faster), grown("fifth", "")):
        assert "have changed, remove their records and runs" in failure(capsys, *run(changed, "ddpo_is"))
    claimed = grown("sixth", faster + task + variant.replace("slow", "ddpo_is"))
    assert "of another suite" in failure(capsys, *run(claimed, "slow"))
    assert len(in_this_process) == 4
    lost = out / "records" / "gone--ddpo_is--seed-0.json"
    write_json(lost, {**in_this_process[0].about, "task": "gone", "error": "RuntimeError: no luck"})
    bench(*run(grown("second", faster + task), "ddpo_is,slow"))  # of a task that the suite no longer has
    assert not lost.exists() and len(in_this_process) == 4


def test_the_commands_of_the_documentation():
    """Every `diffusion-gym bench` of docs/benchmark.md is understood."""
    commands = re.findall(r"^ +diffusion-gym bench ((?:.*\\\n)*.*)$", DOCS.read_text(), flags=re.M)
    assert len(commands) >= 4
    for found in commands:
        words = shlex.split(found.replace("\\\n", " "))
        if words != ["--list"]:
            options = tyro.cli(command.BenchOptions, args=words)
            assert options.suite in [*command.suites(), "my-suite.toml"]


def test_the_suite_of_the_documentation(tmp_path):
    """It loads, builds settings for every agent, and its variant is one."""
    text = DOCS.read_text()
    suite = re.search(r"```toml\n(.*?)```", text, flags=re.S)[1]
    variant = re.search(r"^ +(\[agents\..*?)\n\n", text, flags=re.S | re.M)[1]
    path = tmp_path / "my-suite.toml"
    path.write_text(suite + "\n".join(line.strip() for line in variant.splitlines()))
    cells = matrix.cells_of(str(path), [*AGENTS, "ddpo_is_conditional"], 1, tmp_path)
    settings = cells[-1].settings(cells[-1].load_suite())
    assert settings.env_options.guidance_scale == 1.5 and not settings.agent_options.cfg_training


def test_every_measure_is_documented(tiny_suite, tmp_path, in_this_process):
    bench("--suite", tiny_suite, "--agents", "ddpo_is", "--seeds", 1, "--out", tmp_path)
    point = read_json(in_this_process[0].record)["points"][0]
    told = DOCS.read_text().split("## Measures")[1].split("## Scores")[0]
    documented = set(re.findall(r"`(\w+)`", told))
    held_out = {key for key in point if key.startswith("held_out_")}
    assert set(point) - held_out - documented == {key.removeprefix("held_out_") for key in held_out} - {"reward"}


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1"])
def test_the_signals_of_schedulers_end_it_as_ctrl_c_does(tiny_suite, tmp_path, capsys, monkeypatch, name):
    before = signal.getsignal(getattr(signal, name))
    monkeypatch.setattr(command, "run_local", lambda *_: os.kill(os.getpid(), getattr(signal, name)))
    with pytest.raises(SystemExit) as stopped:
        bench("--suite", tiny_suite, "--agents", "ddpo_is", "--seeds", 1, "--out", tmp_path / "out")
    assert stopped.value.code == 130 and "the same command goes on from the last" in capsys.readouterr().err
    assert signal.getsignal(getattr(signal, name)) is before
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        ".seal.json",
        "tiny.toml",
    }  # which the same command takes
    monkeypatch.setattr(command, "run_local", lambda *_: None)
    with pytest.raises(SystemExit, match="2"):
        bench("--suite", tiny_suite, "--agents", "ddpo_is", "--seeds", 1, "--out", tmp_path / "out")
    assert "holds no benchmark; pass the --out" in capsys.readouterr().err  # it went on, and nothing was measured


def test_the_time_left_is_that_of_the_runs_so_far(capsys):
    progress = command._Progress(Suite.load("smoke"), 10, 0, jobs=2)
    assert progress.left() == ""
    cell = Cell("smoke", "location", "ddpo_is", 0, "out")
    points = [{"reward": 0.0}, {"reward": 1.0}]
    progress.show(cell, {"points": points, "total_seconds": 100.0})
    progress.show(cell, {"error": "ValueError: no", "total_seconds": 1.0})
    progress.show(cell, {"points": points, "total_seconds": 300.0})
    told = capsys.readouterr().out.splitlines()
    assert told[0].endswith("1.7 minutes; about 8 min left") and told[1].endswith("ValueError: no; about 7 min left")
    assert told[2].endswith("5.0 minutes; about 12 min left")
