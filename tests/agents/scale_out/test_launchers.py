"""Training through `accelerate launch` and `torchrun`, as a user does, in gloo on the CPU."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from diffusion_gym.agents.algorithms import AGENTS
from run_folders import metrics_lines
from scale_out_runs import ITERATIONS, SAMPLES, Run, assert_kept, assert_same, files


@pytest.fixture
def launch(rewards_folder):
    """`launch(arguments, count, ...)`: exit code, output and seconds of a training under a launcher."""
    started = []

    def command(count, port, launcher, machine):
        if launcher == "torchrun":
            return ["torch.distributed.run", "--nproc_per_node", str(count), "--master_port", str(port)]
        machines = ["--num_machines", "1"]
        if machine is not None:
            machines = ["--num_machines", "2", "--machine_rank", str(machine), "--main_process_ip", "127.0.0.1"]
        return [
            *("accelerate.commands.launch", "--multi_gpu", "--num_processes", str(count), *machines),
            *("--main_process_port", str(port), "--mixed_precision", "no", "--dynamo_backend", "no"),
        ]

    def start(arguments, count, launcher="accelerate", machine=None, port=None, module="diffusion_gym.agents.cli"):
        env = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "TORCHELASTIC_"))}
        env |= {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        line = [sys.executable, "-m", *command(count, port or free_port(), launcher, machine)]
        line += ["-m", module, *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(line, cwd=rewards_folder, env=env, **pipes)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()  # which the launcher passes on
            process.wait(60)
        process.stdout.close()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def ended(process, seconds=600):
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


PROBE = """
import torch
from diffusion_gym.agents.processes import Processes

processes = Processes.launched()
with processes.leaving():
    number = torch.tensor([1.0 + processes.index])
    processes.sum_([number])
    print(f"rank {processes.index} sum {number.item()}", flush=True)
"""


@pytest.mark.parametrize("launcher", ["accelerate", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_a_launcher_starts_processes_that_find_each_other(launch, rewards_folder, launcher):
    (rewards_folder / "probe.py").write_text(PROBE)
    code, output = ended(launch([], 2, launcher, module="probe"))
    assert code == 0, output
    assert sorted(re.findall(r"rank (\d) sum ([\d.]+)", output)) == [("0", "3.0"), ("1", "3.0")]


@pytest.mark.slow
def test_accelerate_launch_equals_one_process(launch, arguments, alone, tmp_path):
    code, output = ended(launch(arguments(tmp_path / "run"), 2))
    assert code == 0, output
    assert output.count("ddpo_is on scale_out_rewards:DiffusionDenoise-v0") == 1
    assert output.count("3 iterations, 24 reward queries") == 1
    assert files(tmp_path / "run") == files(alone(agent="ddpo_is"))
    found, expected = Run(tmp_path / "run"), Run(alone(agent="ddpo_is"))
    assert_same(found, expected)
    # Sums in another order: were it one process after all, not a bit would differ.
    assert any(not torch.equal(found.tensors[name], value) for name, value in expected.tensors.items())


@pytest.mark.slow
def test_accelerate_launch_ends_when_one_process_fails(launch, arguments, alone, rewards_folder, tmp_path):
    code, output = ended(launch(arguments(tmp_path / "run", reward="Broken", checkpoint_every=10), 2))
    assert time.time() - (rewards_folder / "failed").stat().st_mtime < 120
    assert code != 0
    reason = "reward='reward' raised ConnectionError: reward server gone"
    assert output.count(f"error: process 1 of 2 failed: RewardError: {reason}") == 1
    assert f"error: {reason}" not in output  # the main process tells
    assert_kept(tmp_path / "run", alone(agent="ddpo_is"))


@pytest.mark.slow
@pytest.mark.parametrize("agent", sorted(AGENTS))
@pytest.mark.parametrize("count", [2, 4])
def test_every_agent_under_accelerate_launch(launch, arguments, alone, tmp_path, agent, count):
    code, output = ended(launch(arguments(tmp_path / "run", agent=agent), count))
    assert code == 0, output
    assert_same(Run(tmp_path / "run"), Run(alone(agent=agent)))


@pytest.mark.slow
def test_torchrun(launch, arguments, alone, tmp_path):
    code, output = ended(launch(arguments(tmp_path / "run"), 4, "torchrun"))
    assert code == 0, output
    assert_same(Run(tmp_path / "run"), Run(alone(agent="ddpo_is")))


@pytest.mark.slow
def test_two_launchers_as_on_two_machines(launch, arguments, alone, tmp_path):
    port = free_port()
    machines = [launch(arguments(tmp_path / "run"), 4, machine=machine, port=port) for machine in (1, 0)]
    for process in machines:
        code, output = ended(process)
        assert code == 0, output
    assert_same(Run(tmp_path / "run"), Run(alone(agent="ddpo_is")))


@pytest.mark.slow
@pytest.mark.parametrize("agent", ["ddpo_is", "dpok"])
def test_a_launched_run_is_resumed(launch, arguments, alone, paired, tmp_path, agent):
    part, queries = tmp_path / "part", SAMPLES * ITERATIONS
    assert ended(launch(arguments(part, agent=agent, total_reward_queries=SAMPLES), 2))[0] == 0
    line = ["train", "--resume", "--out", str(part), "--total-reward-queries", str(queries)]
    code, output = ended(launch(line, 2))
    assert code == 0, output
    found, expected = Run(part), Run(paired(agent)[1])
    assert found.rows == expected.rows and found.state == expected.state
    assert all(torch.equal(found.tensors[name], value) for name, value in expected.tensors.items())
    assert_same(found, Run(alone(agent=agent)))


@pytest.mark.slow
def test_a_killed_process_ends_all(launch, arguments, alone, rewards_folder, tmp_path):
    code, output = ended(launch(arguments(tmp_path / "run", reward="Killed"), 2))
    assert time.time() - (rewards_folder / "failed").stat().st_mtime < 120
    assert code != 0 and "Signal 9 (SIGKILL) received" in output
    assert output.count("error: another process of the training is gone") == 1
    assert_kept(tmp_path / "run", alone(agent="ddpo_is"))


@pytest.mark.slow
def test_ctrl_c_of_the_launcher_ends_after_the_iteration(launch, arguments, tmp_path):
    options = {"total_reward_queries": 10_000 * SAMPLES, "checkpoint_every": 10_000}
    process = launch(arguments(tmp_path / "run", **options), 2)
    while not metrics_lines(tmp_path / "run"):
        assert process.poll() is None
        time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, output = ended(process)
    assert output.count("Stopping after this iteration") == 1 and "Stopped early" in output
    run = Run(tmp_path / "run")
    assert run.checkpoints == [f"iteration-{len(run.rows):06d}.safetensors"]
