"""`train --profile`: the table, profile.json and the trace; and that it changes nothing else."""

import contextlib
import gzip
import io
import json
import re
import shutil
import socket
import tempfile

import pytest
import torch

from diffusion_gym.agents.cli import main
from diffusion_gym.agents.training import profile as profile_module
from diffusion_gym.agents.training.development import DevelopmentSet
from diffusion_gym.agents.training.profile import Profile
from diffusion_gym.agents.training.schedule import Schedule
from diffusion_gym.agents.training.trainer import Trainer
from diffusion_gym.storage import load_tensors, read_json
from diffusion_gym.timing import span
from run_folders import file_names, metrics_rows
from trainer_runs import brightness

SIZE = 4  # pictures of an iteration
ALWAYS = {"rollout UNet", "text encoder", "decode", "reward", "training forward", "training backward", "optimiser"}


class Clock:
    """A clock of its own, moved by the test."""

    def __init__(self):
        self.now = 0.0

    def mark(self):
        return self.now

    def seconds(self, marks):
        return [after - before for before, after in zip(marks, marks[1:], strict=False)]


class Sessions:
    """Stands in for torch.profiler.profile: what began and ended, in order."""

    log: list

    def __init__(self, activities):
        self.number = len(type(self).log)

    def start(self):
        self.log.append("start")

    def stop(self):
        self.log.append("stop")

    def export_chrome_trace(self, path):
        events = [{"ph": "X", "name": "op"}, {"ph": "s", "id": 1}, {"ph": "f", "id": 1}]
        with open(path, "w") as file:
            json.dump({"host_name": "box", "traceName": path, "traceEvents": events}, file)


@pytest.fixture
def sessions(monkeypatch):
    monkeypatch.setattr(torch.profiler, "profile", Sessions)
    Sessions.log = []
    return Sessions.log


def iterate(profile, clock, seconds, last=False):
    """An iteration in which phase a takes `seconds` in two calls, and 1 second is nobody's."""
    with profile.iteration(last):
        clock.now += 1
        for _ in range(2):
            with span("a"):
                clock.now += seconds / 2


@pytest.mark.parametrize(
    "seconds, expected",
    [([9], 9), ([9, 4], 4), ([9, 4, 2], 2), ([9, 4, 2, 7], 4.5)],
    ids=["alone", "warm-up-left-out", "traced-left-out", "mean"],
)
def test_which_iterations_are_averaged(sessions, seconds, expected):
    clock = Clock()
    profile = Profile(torch.device("cpu"), clock)
    for number, value in enumerate(seconds, 1):
        iterate(profile, clock, value, last=number == len(seconds))
    a, other = profile.rows()
    assert (a.phase, a.seconds, a.calls) == ("a", expected, 2)
    assert (other.phase, other.seconds, other.calls) == ("other", 1, None)
    assert a.share == pytest.approx(100 * expected / (expected + 1))
    assert sessions == ["start", "stop"]  # one iteration was traced


def test_the_table(sessions, tmp_path):
    clock = Clock()
    profile = Profile(torch.device("cpu"), clock)
    for _ in range(2):
        iterate(profile, clock, 3)
    with profile.iteration(last=False):
        with span("a"):
            clock.now += 3
        with span("b"):
            clock.now += 0.5
        clock.now += 0.5
    iterate(profile, clock, 11)
    lines = profile.write(tmp_path).splitlines()
    # means of (3, 11) and (0.5, 0) and (0.5, 1): 7, 0.25 and 0.75 of 8 seconds
    assert lines[:6] == [
        "Where the time of an iteration goes (mean of 2 of 4)",
        "phase      seconds    share     calls",
        "a            7.000   87.5 %       1.5",
        "b            0.250    3.1 %       0.5",
        "other        0.750    9.4 %",
        "iteration    8.000  100.0 %",
    ]
    assert lines[6:] == [
        f"Numbers: {tmp_path / 'profile.json'}",
        f"Trace of one iteration: {tmp_path / 'trace.json'}; open it at https://ui.perfetto.dev or chrome://tracing",
    ]
    stored = read_json(tmp_path / "profile.json")
    assert stored["phases"][0] == {"phase": "a", "seconds": 7.0, "share": 87.5, "calls": 1.5}
    assert (stored["iterations"], stored["averaged_iterations"], stored["seconds_per_iteration"]) == (4, 2, 8.0)


def test_an_iteration_that_fails_does_not_count(sessions, tmp_path):
    clock = Clock()
    profile = Profile(torch.device("cpu"), clock)
    with pytest.raises(KeyError), profile.iteration(last=False):
        raise KeyError
    assert profile.write(tmp_path) == "profile: no iteration was finished"
    assert file_names(tmp_path) == []
    iterate(profile, clock, 3)
    assert profile.rows()[0].seconds == 3
    assert profile.write(tmp_path).endswith("No trace: the run ended before the iteration that is traced")
    assert file_names(tmp_path) == ["profile.json"]


def test_the_trace_is_of_the_first_calls_of_each_phase(sessions):
    profile = Profile(torch.device("cpu"), Clock())
    with profile.iteration(last=True):
        for _ in range(profile_module._TRACED_CALLS + 3):
            with span("rollout"):
                sessions.append("rollout")
        with span("decode"):
            sessions.append("decode")
        with span("rollout"):
            sessions.append("rollout")
        with span("train"):
            with span("pictures", whole=True):
                sessions.append("pictures")
    first = ["start", *["rollout"] * profile_module._TRACED_CALLS, "stop"]
    assert sessions == [*first, *["rollout"] * 3, "start", "decode", "stop", "rollout", "start", "stop", "pictures"]


def test_sessions_are_joined_without_names_of_the_machine(sessions, tmp_path, monkeypatch):
    profile = Profile(torch.device("cpu"), Clock())
    with profile.iteration(last=True):
        for name in ("a", "whole", "b"):
            with span(name, whole=name == "whole"):
                pass
    profile.write(tmp_path)
    trace = read_json(tmp_path / "trace.json")
    assert list(trace) == ["traceEvents"]
    arrows = [event["id"] for event in trace["traceEvents"] if "id" in event]
    assert len(arrows) == 4 and arrows[0] == arrows[1] != arrows[2] == arrows[3]
    monkeypatch.setattr(profile_module, "_COMPRESSED_FROM", 10)
    assert "trace.json.gz; open" in profile.write(tmp_path)
    assert file_names(tmp_path) == ["profile.json", "trace.json.gz"]
    assert json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes())) == trace


def test_the_profiler_says_nothing_on_the_progress_bar(capfd, tmp_path):
    profile = Profile(torch.device("cpu"))
    with profile.iteration(last=True):
        for name in ("a", "b"):
            with span(name):
                torch.ones(2) + 1
    profile.write(tmp_path)
    assert capfd.readouterr().err == ""
    names = [event["name"] for event in read_json(tmp_path / "trace.json")["traceEvents"]]
    assert {"a", "b", "aten::add"} <= set(names)


def test_a_background_reward_is_waited_for(make_env, make_agent, tmp_path, sessions):
    def reward(images, prompts, metadata):
        return brightness(images, prompts, metadata)

    reward.background = True
    env = make_env(SIZE, num_inference_steps=2, autoreset_mode="Disabled", reward=reward)
    profile = Profile(torch.device("cpu"))
    schedule = Schedule(SIZE, SIZE, pictures_every=0)
    Trainer(env, make_agent(env), tmp_path, schedule, progress=False, track="none", profile=profile).run()
    calls = {row.phase: row.calls for row in profile.rows()}
    assert calls["waiting for rewards"] == 1 and "reward" not in calls


def test_pictures_development_and_checkpoints(make_env, make_agent, tmp_path, sessions):
    env, small = (make_env(SIZE, num_inference_steps=2, autoreset_mode="Disabled") for _ in range(2))
    schedule = Schedule(3 * SIZE, SIZE, checkpoint_every=2, pictures_every=2, development_every=2)
    trainer = Trainer(env, make_agent(env), tmp_path, schedule, 0, small, progress=False, track="none")
    trainer.development, trainer.profile = DevelopmentSet(small, tmp_path, 0, SIZE, 0), Profile(torch.device("cpu"))
    trainer.run()
    trainer.profile._traced = 9  # the second iteration, with all of these, is averaged too
    calls = {row.phase: row.calls for row in trainer.profile.rows()}
    assert {calls[name] for name in ("pictures", "development", "checkpoint")} == {0.5}
    assert calls["rollout UNet"] == 2  # T, without those of the pictures and the development set


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def train(tiny_pipeline, tmp_path_factory):
    """`train(name, *more)`: the command, into the folder of that name."""
    root = tmp_path_factory.mktemp("runs")

    def run(name, *more, iterations=3):
        options = {"--env": "DiffusionDenoise-v0", "--env.model": tiny_pipeline, "--out": root / name}
        options |= {"--env.reward": "Compressibility", "--env.prompts": "a red circle", "--env.num-inference-steps": 2}
        options |= {"--samples-per-iteration": SIZE, "--rollout-batch": 2, "--agent.batch-size": 2, "--track": "none"}
        options |= {"--total-reward-queries": iterations * SIZE, "--agent.learning-rate": 1e-3}
        main(["train", *(str(part) for pair in options.items() for part in pair), "--agent.inner-epochs", "1", *more])
        return root / name

    return run


@pytest.fixture(scope="module")
def profiled(train):
    """A run folder and what the command printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        folder = train("profiled", "--profile")
    return folder, printed.getvalue()


@pytest.fixture(scope="module")
def plain(train):
    """The same run without --profile."""
    return train("plain")


def test_the_command_prints_the_phases(profiled):
    folder, printed = profiled
    found = {
        name.strip(): (float(seconds), float(share), calls)
        for name, seconds, share, calls in re.findall(
            r"^([a-zA-Z ]+?) +([\d.]+) +([\d.]+) %(?: +([\d.]+))?$", printed, re.MULTILINE
        )
    }
    assert set(found) == {*ALWAYS, "other", "iteration"}
    shares = [share for name, (_, share, _) in found.items() if name != "iteration"]
    assert sum(shares) == pytest.approx(100, abs=0.05 * len(shares) + 1e-9)
    # two batches of T = 2 steps; two updates of one micro-batch each
    calls = {name: int(found[name][2]) for name in ALWAYS}
    assert calls == {
        "rollout UNet": 4,
        "text encoder": 2,
        "decode": 2,
        "reward": 2,
        "training forward": 2,
        "training backward": 2,
        "optimiser": 2,
    }
    assert "mean of 1 of 3" in printed and f"Numbers: {folder / 'profile.json'}" in printed


def test_the_numbers_are_those_of_the_table(profiled):
    folder, printed = profiled
    stored = read_json(folder / "profile.json")
    assert {row["phase"] for row in stored["phases"]} == {*ALWAYS, "other"}
    assert sum(row["share"] for row in stored["phases"]) == pytest.approx(100)
    assert sum(row["seconds"] for row in stored["phases"]) == pytest.approx(stored["seconds_per_iteration"])
    for row in stored["phases"]:
        assert f"{row['seconds']:8.3f} {row['share']:6.1f} %" in printed
    # by another clock, that of metrics.jsonl, which goes from the rollout to the update: the third iteration
    seconds = [json.loads(line)["seconds"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert stored["seconds_per_iteration"] >= seconds[2] - 0.001


def test_the_trace_has_the_phases_and_their_operations(profiled):
    folder, _ = profiled
    text = (folder / "trace.json").read_text()
    events = json.loads(text)["traceEvents"]
    phases = [event for event in events if event.get("cat") == "user_annotation"]
    assert {event["name"] for event in phases} >= ALWAYS
    assert all(event["ph"] == "X" and event["dur"] >= 0 for event in phases)
    unet = next(event for event in phases if event["name"] == "rollout UNet")
    inside = [e for e in events if e.get("cat") == "cpu_op" and 0 <= e["ts"] - unet["ts"] <= unet["dur"]]
    assert any("conv" in event["name"] for event in inside)
    for name in (tempfile.gettempdir(), str(folder), socket.gethostname() * (len(socket.gethostname()) > 4)):
        assert not name or name not in text


def test_the_training_is_the_same_bit_for_bit(profiled, plain):
    assert metrics_rows(plain) == metrics_rows(profiled[0])
    name = "checkpoints/iteration-000003.safetensors"
    first, second = (load_tensors(folder / name) for folder in (plain, profiled[0]))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    extra = {"profile.json", "trace.json"}
    assert set(file_names(plain)) == set(file_names(profiled[0])) - extra
    stored = [read_json(folder / "config.json")["settings"] for folder in (plain, profiled[0])]
    assert stored[0] == stored[1]


@pytest.mark.parametrize("asked", [True, False])
def test_a_run_goes_on_with_and_without(profiled, plain, tmp_path, capsys, asked):
    """A run that was begun without is profiled from here on, and the other way round."""
    folder = shutil.copytree(plain if asked else profiled[0], tmp_path / "run")
    (folder / "profile.json").unlink(missing_ok=True)
    words = ["train", "--resume", "--out", str(folder), "--total-reward-queries", str(4 * SIZE)]
    main([*words, *["--profile"] * asked])
    assert ("mean of 1 of 1" in capsys.readouterr().out) is asked
    assert len(metrics_rows(folder)) == 4
    assert (folder / "profile.json").exists() is asked


def test_a_finished_run_has_nothing_to_time(profiled, capsys):
    before = (profiled[0] / "profile.json").read_bytes()
    main(["train", "--resume", "--out", str(profiled[0]), "--profile"])
    assert "profile: no iteration was finished" in capsys.readouterr().out
    assert (profiled[0] / "profile.json").read_bytes() == before


def test_a_second_ctrl_c_still_shows_the_table(train, capsys, monkeypatch):
    iterate = Trainer._iterate

    def interrupted(trainer, *arguments):
        if trainer.done.iteration == 2:
            raise KeyboardInterrupt
        iterate(trainer, *arguments)

    monkeypatch.setattr(Trainer, "_iterate", interrupted)
    with pytest.raises(SystemExit) as stop:
        train("interrupted", "--profile")
    assert stop.value.code == 130
    assert "Where the time of an iteration goes (mean of 1 of 2)" in capsys.readouterr().out


@pytest.mark.gpu
def test_a_gpu_is_timed_by_its_own_clock_and_its_kernels_are_traced(train, capsys):
    folder = train("gpu", "--profile", "--env.device", "cuda")
    assert "rollout UNet" in capsys.readouterr().out
    assert read_json(folder / "profile.json")["device"] == "cuda"
    assert any(event.get("cat") == "kernel" for event in read_json(folder / "trace.json")["traceEvents"])
