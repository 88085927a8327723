"""An agent from outside the package, found as module:Class: trained, resumed, evaluated, and its mistakes named."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion_gym.agents.algorithms import DDPOSF, Agent, agent_class
from diffusion_gym.agents.cli import main, parse_train
from diffusion_gym.agents.processes import Processes
from diffusion_gym.storage import load_tensors, tensors_metadata
from run_folders import metrics_rows

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = (ROOT / "docs" / "custom-agents.md").read_text()
EXAMPLE = (ROOT / "examples" / "custom_agent.py").read_text()
MODULES = {
    "running_mean": re.search(r"```python\n(.*?)```", DOCS, flags=re.S)[1],
    "custom_agent": EXAMPLE,
    "unfinished_agent": "from diffusion_gym.agents.algorithms import Agent\nclass Mine(Agent): pass\nnumber = 3\n",
    "needs_more": "import a_package_that_is_not_installed\n",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current directory, with the modules in it; what they leave in the interpreter goes again."""
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != ""])
    importlib.invalidate_caches()
    yield tmp_path
    for name in MODULES:
        sys.modules.pop(name, None)


def train_arguments(pipeline, out, agent, queries=16, *more):
    options = {
        "--env": "DiffusionDenoise-v0",
        "--env.model": pipeline,
        "--env.reward": "Compressibility",
        "--env.num-inference-steps": 3,
        "--agent": agent,
        "--agent.trainable": "lora",
        "--out": out,
        "--total-reward-queries": queries,
        "--samples-per-iteration": 8,
        "--rollout-batch": 4,
        "--checkpoint-every": 1,
    }
    prompts = ["--env.prompts", "a red circle", "two blue stars"]
    return ["train", *prompts, *(str(part) for pair in options.items() for part in pair), *map(str, more)]


def failure(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def newest(out):
    path = sorted((out / "checkpoints").iterdir())[-1]
    return load_tensors(path), json.loads(tensors_metadata(path)["state"])


def test_train_resume_eval_and_report(tiny_pipeline, folder, capsys):
    """The agent of the documentation, whose state is one number."""
    whole, out = folder / "whole", folder / "part"
    agent, option = "running_mean:RunningMean", ["--agent.baseline-decay", 0.6, "--agent.learning-rate", 1e-3]
    main(train_arguments(tiny_pipeline, whole, agent, 24, *option))
    main(train_arguments(tiny_pipeline, out, agent, 8, *option))
    main(["train", "--resume", "--out", str(out), "--total-reward-queries", "24"])

    settings = json.loads((out / "config.json").read_text())["settings"]
    assert settings["agent"] == agent and settings["agent_options"]["baseline_decay"] == 0.6
    baseline = 0.0
    for row in metrics_rows(whole):
        baseline = 0.6 * baseline + 0.4 * row["reward_mean"]
    (tensors, state), (resumed_tensors, resumed_state) = newest(whole), newest(out)
    assert state["agent"]["baseline"] == pytest.approx(baseline, rel=1e-12)

    assert resumed_state == state
    assert all(torch.equal(value, resumed_tensors[key]) for key, value in tensors.items())
    assert metrics_rows(out) == metrics_rows(whole)
    capsys.readouterr()
    main(["eval", str(out), "--samples", "8", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["agent"] == agent and result["iteration"] == 3
    assert result["reward_mean"] != result["base_reward_mean"]
    main(["report", str(out)])
    assert agent in (out / "report.html").read_text()


def test_resume_and_eval_need_the_module(tiny_pipeline, folder, capsys):
    out = folder / "run"
    main(train_arguments(tiny_pipeline, out, "custom_agent:RLOO", 8))
    capsys.readouterr()
    before = (out / "metrics.jsonl").read_bytes()
    (folder / "custom_agent.py").rename(folder / "renamed.py")
    del sys.modules["custom_agent"]
    importlib.invalidate_caches()
    main(["report", str(out)])  # which imports nothing
    for arguments in (["eval", str(out)], ["train", "--resume", "--out", str(out)]):
        error = failure(arguments, capsys)
        assert error.startswith("error: agent='custom_agent:RLOO' cannot be imported (No module named 'custom_agent')")
        assert "PYTHONPATH" in error and error.count("\n") == 1
    assert (out / "metrics.jsonl").read_bytes() == before


def test_from_the_console(folder):
    """The installed command finds a module of the current directory, and explains its options."""
    command = [
        str(Path(sys.executable).parent / "diffusion-gym"),
        "train",
        "--agent",
        "custom_agent:RLOO",
        "--help-all",
    ]
    without = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=without, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"--agent\.group-size INT.*k, samples in a row that share a prompt", done.stdout, flags=re.S)
    assert "--agent.learning-rate" in done.stdout and "--agent.clip-range" not in done.stdout


@pytest.mark.parametrize(
    ("agent", "more", "message"),
    [
        ("nowhere:Mine", [], "agent='nowhere:Mine' cannot be imported (No module named 'nowhere'); run in the folder"),
        ("custom_agent.py:RLOO", [], "agent='custom_agent.py:RLOO' cannot be imported"),
        ("./custom_agent.py:RLOO", [], "agent='./custom_agent.py:RLOO' must be module:Class, such as"),
        ("custom_agent:", [], "agent='custom_agent:' must be module:Class, such as"),
        (":RLOO", [], "agent=':RLOO' must be module:Class, such as"),
        ("needs_more:Mine", [], "cannot be imported (No module named 'a_package_that_is_not_installed')"),
        ("custom_agent:rloo", [], "agent='custom_agent:rloo' is unknown; did you mean 'custom_agent:RLOO'? known: "),
        ("unfinished_agent:number", [], "agent='unfinished_agent:number' is no subclass of"),
        ("custom_agent:RLOOConfig", [], "agent='custom_agent:RLOOConfig' is no subclass of"),
        ("unfinished_agent:Mine", [], "abstract"),
        ("custom_agent:RLOO", ["--agent.group-size", 1], "group_size=1 must be at least 2"),
        ("custom_agent:RLOO", ["--agent.group-size", 3], "group_size=3 must divide the rollout's batch, num_envs=4"),
        ("custom_agent:RLOO", ["--agent.group-sise", 4], "--agent.group-sise"),
    ],
)
def test_a_mistake_is_named(tiny_pipeline, folder, capsys, agent, more, message):
    assert message in failure(train_arguments(tiny_pipeline, folder / "run", agent, 8, *more), capsys)


def test_a_bug_in_the_module_is_not_hidden(folder):
    (folder / "needs_more.py").write_text("print(a_name_that_is_not_there)\n")
    with pytest.raises(NameError, match="a_name_that_is_not_there"):
        agent_class("needs_more:Mine")


def test_the_registered_names_and_those_of_a_package_are_found():
    assert agent_class("ddpo_sf") is DDPOSF
    assert agent_class("diffusion_gym.agents.algorithms:DDPOSF") is DDPOSF


def test_the_commands_of_the_documentation_are_understood(folder):
    for text in (DOCS, EXAMPLE):
        commands = re.findall(r"^ +diffusion-gym (train (?:.*\\\n)*.*)$", text, flags=re.M)
        assert commands
        for command in commands:
            words = shlex.split(command.replace("\\\n", " "))
            if "--resume" not in words:
                assert str(parse_train(words[1:]).out).startswith("runs/")


def test_every_name_of_the_documentation_exists(folder):
    import diffusion_gym.agents.algorithms as public

    agent = agent_class("running_mean:RunningMean")
    contract = DOCS.split("## The contract")[1].split("## Determinism")[0]
    named = re.findall(r"^\| (`[^|]*`) \|", contract, flags=re.M)
    calls = [call for cell in named for call in re.findall(r"`([\w.]+)\(", cell)]
    assert len(calls) >= 12
    for call in calls:
        first, _, method = call.partition(".")
        assert hasattr(getattr(public, first), method) if method else hasattr(agent, call) or hasattr(public, call), (
            call
        )
    assert set(re.findall(r"`(NoUsableReward|PolicyGradientAgent|AgentConfig|DDPOIS)", DOCS)) <= set(public.__all__)


# --- the example -----------------------------------------------------------------------------------------------


def test_the_leave_one_out_advantages(folder):
    """Against the sum over the others, sample by sample."""
    agent_class("custom_agent:RLOO")
    leave_one_out = sys.modules["custom_agent"].leave_one_out
    rewards = np.random.default_rng(0).normal(size=12)
    for size in (2, 3, 4):
        found = leave_one_out(rewards, size)
        for i, reward in enumerate(rewards):
            group = range(i // size * size, i // size * size + size)
            others = [rewards[j] for j in group if j != i]
            assert found[i] == pytest.approx(reward - sum(others) / len(others))
    # a failed reward is no one's baseline, and a sample without others has none
    nan = float("nan")
    found = leave_one_out(np.array([1.0, nan, 4.0, float("inf"), 2.0, nan]), 3)
    assert found.tolist() == pytest.approx([-3.0, nan, 3.0, nan, nan, nan], nan_ok=True)


def test_the_update_of_the_example(folder, make_env, make_policy):
    """Groups share a prompt; the loss is the mean of -A log pi; the gradient step is that of AdamW on it."""
    chosen = agent_class("custom_agent:RLOO")
    env = make_env(4, autoreset_mode="Disabled")
    options = {"group_size": 2, "learning_rate": 1e-3, "max_grad_norm": 1e9, "micro_batch_size": 5}
    agent = chosen(make_policy(env), chosen.Config(**options))
    trajectories = agent.sample(env, 8, (0, 0, 1))
    assert trajectories.prompts[::2] == trajectories.prompts[1::2] and len(set(trajectories.prompts)) > 1

    rewards = trajectories.rewards.double().numpy()
    advantages = np.clip(rewards - rewards.reshape(-1, 2)[:, ::-1].reshape(-1), -1, 1)
    weights = torch.as_tensor(advantages, dtype=torch.float32)
    twin = make_policy(env)  # the same weights
    adam = torch.optim.AdamW(twin.trainable_parameters().values(), lr=1e-3, weight_decay=1e-4)
    loss = torch.zeros(())
    for step in range(4):
        samples = torch.arange(8)
        steps = torch.full_like(samples, step)
        log_prob = twin(trajectories.states(samples, steps), trajectories.actions(samples, steps))
        loss = loss - (weights * log_prob).mean() / 4
    loss.backward()
    adam.step()

    metrics = agent.update(trajectories, np.random.default_rng(0))
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-7)
    assert metrics["advantage_std"] == pytest.approx(advantages.std())
    before = make_policy(env).trainable_parameters().values()
    assert all((found - start).abs().max() > 5e-4 for found, start in zip(agent.parameters, before, strict=True))
    for found, expected in zip(agent.parameters, twin.trainable_parameters().values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_own_is_the_share_of_a_process(make_agent, make_env, roll):
    env = make_env(4)
    agent: Agent = make_agent(env)
    trajectories = roll(env, agent.policy)
    agent.processes = Processes(index=1, count=3)
    own = agent.local_values(np.arange(12.0), trajectories)
    assert own.tolist() == [4, 5, 6, 7] and own.dtype == torch.float32
