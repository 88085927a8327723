"""`train`, `eval` and `bench` with rewards that exit or hang: one clear line, and what was learned is kept."""

import json
import os
import re
import signal
import subprocess
import sys
import threading

import pytest

from command_line import failure, train_arguments
from diffusion_gym.agents.cli import main
from diffusion_gym.agents.training import ending
from run_folders import file_names, metrics_rows
from trainer_runs import brightness

# What the reward of the command line does when it is called for the n-th time.
ACTS = {}


@pytest.fixture(autouse=True)
def rewards(monkeypatch):
    """`module:attribute` names this module's `reward`; an event that ends its hanging, at the latest with the test."""
    ended = threading.Event()
    monkeypatch.setitem(sys.modules, "hanging_rewards", sys.modules[__name__])
    monkeypatch.setattr(ending, "abandoned", lambda: False)
    monkeypatch.setitem(ACTS, "hang", lambda: ended.wait(600))
    monkeypatch.setattr(f"{__name__}.calls", [])
    yield ended
    ended.set()


calls = []


def reward(images, prompts, metadata):
    calls.append(None)
    if act := ACTS.get(len(calls)):
        act()
    return brightness(images, prompts, metadata)


@pytest.fixture
def at(monkeypatch):
    """`at(n, *acts)`: what the reward's n-th call does; "hang" hangs."""

    def plan(number, *acts):
        def act():
            for each in acts:
                (ACTS[each] if isinstance(each, str) else each)()

        monkeypatch.setitem(ACTS, number, act)

    return plan


def send(signum):
    return lambda: os.kill(os.getpid(), signum)


def leave():
    raise SystemExit(3)


OPTIONS = {"--env.reward": "hanging_rewards:reward", "--pictures-every": 0, "--checkpoint-every": 10, "--track": "none"}
SECOND_ITERATION = 1 + 2 + 1  # its first call, after that of the first pictures and two batches


def arguments(pipeline, out, **more):
    return train_arguments(pipeline, out, **OPTIONS, **more)


def go_on(out):
    return f"a checkpoint keeps iteration 1, go on with: diffusion-gym train --resume --out {re.escape(str(out))}"


ENDS = {
    "exits": ([leave], 2, r"reward='reward' raised SystemExit: 3 \(test_hanging_rewards\.py:\d+\)"),
    "two ctrl-c": ([send(signal.SIGINT), send(signal.SIGINT), "hang"], 130, "stopped at once"),
    "ctrl-c": ([send(signal.SIGINT), "hang"], 130, r"reward='reward' has not answered for \d+ s to a run that is.*"),
    "terminated": ([send(signal.SIGTERM), "hang"], 130, r"reward='reward' has not answered for \d+ s to a run that .*"),
}


@pytest.mark.parametrize("acts, code, reason", ENDS.values(), ids=ENDS)
def test_train_ends_with_one_line_and_goes_on(tiny_pipeline, tmp_path, capsys, monkeypatch, at, acts, code, reason):
    monkeypatch.setattr(ending, "_PATIENCE", 0.1)
    at(SECOND_ITERATION, *acts)
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        main(arguments(tiny_pipeline, out))
    assert stop.value.code == code
    *_, line = capsys.readouterr().err.splitlines()  # after the progress bar
    assert re.fullmatch(rf"error: {reason}; {go_on(out)}", line)
    assert file_names(out / "checkpoints") == ["iteration-000001.safetensors"]
    main(["train", "--resume", "--out", str(out)])
    assert len(metrics_rows(out)) == 2


def test_a_time_limit_ends_train_and_may_be_raised_for_the_rest(tiny_pipeline, tmp_path, capsys, rewards, at):
    at(SECOND_ITERATION, "hang")
    out = tmp_path / "run"
    line = failure(arguments(tiny_pipeline, out, **{"--env.reward-seconds": 5}), capsys).splitlines()[-1]
    reason = r"reward='reward': the reward has not returned for [\d.]+ s \(reward_seconds=5\); mend it, or allow .*"
    assert re.fullmatch(rf"error: {reason}; {go_on(out)}", line)
    assert json.loads((out / "config.json").read_text())["settings"]["env_options"]["reward_seconds"] == 5
    rewards.set()  # one thread calls a reward at a time, and the one that was left alone is of this process
    main(["train", "--resume", "--out", str(out), "--env.reward-seconds", "500"])
    assert len(metrics_rows(out)) == 2
    assert "eta=0.5" in failure(["train", "--resume", "--out", str(out), "--env.eta", "0.5"], capsys)


def test_eval_ends_with_one_line(tiny_pipeline, tmp_path, capsys, at):
    out = tmp_path / "run"
    main(arguments(tiny_pipeline, out))
    calls.clear()
    at(1, leave)
    assert "error: reward='reward' raised SystemExit: 3" in failure(["eval", str(out), "--samples", "4"], capsys)
    at(2, "hang")
    error = failure(["eval", str(out), "--samples", "4", "--reward-seconds", "5"], capsys)
    assert re.match(r"error: reward='reward': the reward has not returned for [\d.]+ s \(reward_seconds=5\)", error)
    assert not (out / "eval.json").exists()


def test_a_thread_in_a_librarys_code_does_not_abort_the_program():
    """Python ends such threads on its way out, which PyTorch answers with an abort."""
    code = """if True:
        import torch
        from diffusion_gym.agents.training.ending import abandoned, leave
        from diffusion_gym.rewards import RewardError, evaluate
        from diffusion_gym.rewards.time_limit import TimeLimited

        def endless(images, prompts, metadata):
            while True:
                images = (images @ images).clamp(0, 1)

        try:
            evaluate(TimeLimited(endless, 0.1), torch.rand(1, 3, 300, 300), ["a"])
        except RewardError as error:
            print(abandoned(), error)
            leave(7)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 7, done.stderr
    assert done.stdout.startswith("True reward='endless': the reward has not returned") and done.stderr == ""
