"""Several processes give what one gives, fail together and resume each other's runs. All of it in gloo on the CPU.

Most tests fork this process, which is quick; a few go through `accelerate launch` and `torchrun` as a user does. Every
run is in a child, so that the rewards registered for it stay there.
"""

import contextlib
import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from diffusion_gym.agents import checkpoint, runs
from diffusion_gym.agents.algorithms import AGENTS, policy_gradient
from diffusion_gym.agents.cli import main
from diffusion_gym.agents.optimization import AccumulatingOptimizer, OptimizerOptions
from diffusion_gym.agents.processes import Processes
from diffusion_gym.agents.rollout import Trajectories, collect_many
from diffusion_gym.storage import tensors_metadata
from diffusion_gym.wrappers.one_step import OneStepVectorEnv

SAMPLES, BATCH, ITERATIONS = 8, 2, 3
CLOCKS = {"seconds", "rollout_seconds", "images_per_second"}

REWARDS_MODULE = '''
import os, pathlib, signal, torch
from diffusion_gym.rewards import REWARDS, RewardOutput

RANK, FIRST_ITERATION = os.environ.get("RANK", "0"), {batches} // int(os.environ.get("WORLD_SIZE", "1"))

def register(name, act, ranks, after=FIRST_ITERATION):
    """Brightness; in the processes `ranks`, after so many batches, what `act` makes of it."""
    def make():
        calls = []
        def reward(images, prompts, metadata):
            calls.append(None)
            scores = images.mean((1, 2, 3))
            parts = {{"red": images[:, 0].mean((1, 2)), **({{"odd": scores}} if RANK == "1" else {{}})}}
            return RewardOutput(act(scores) if RANK in ranks and len(calls) > after else scores, parts)
        return reward
    REWARDS.register(name)(make)

def broken(scores):
    pathlib.Path(__file__).with_name("failed").touch()
    raise ConnectionError("reward server gone")

def killed(scores):
    pathlib.Path(__file__).with_name("failed").touch()
    os.kill(os.getpid(), signal.SIGKILL)

register("Brightness", None, "")
register("PartlyMissing", lambda scores: scores.where(scores < scores.amax(), torch.nan), "0123", 0)
register("Broken", broken, "1")
register("Nothing", lambda scores: scores * torch.nan, "0123")
register("Killed", killed, "1")
'''

OPTIONS = {
    "ddpo_sf": {"inner-epochs": 2},
    "ddpo_is": {"inner-epochs": 2, "batch-size": 5, "timestep-fraction": 0.7},
    "ddpo_iskl": {"kl-weight": 1.0, "batch-size": 5, "normalization": "group", "group-size": 2},
    "dpok": {"updates": 3, "batch-size": 7, "value-updates": 2, "value-batch-size": 9, "replay-iterations": 2},
    "rwr": {"updates": 4, "batch-size": 5, "inverse-temperature": 50.0},
    "rwr_sparse": {"updates": 4, "batch-size": 3, "percentile": 0.5},
}


@pytest.fixture(scope="module")
def rewards_folder(tmp_path_factory):
    """Where the module with the tests' rewards is."""
    import torch.utils.tensorboard  # noqa: F401 - the forks need not import it again

    import diffusion_gym.models.latent  # noqa: F401 - the same
    import diffusion_gym.models.lora  # noqa: F401 - the same

    folder = tmp_path_factory.mktemp("rewards")
    (folder / "scale_out_rewards.py").write_text(REWARDS_MODULE.format(batches=SAMPLES // BATCH))
    return folder


@pytest.fixture(scope="module")
def arguments(tiny_pipeline):
    """`arguments(out, agent, reward, **options)` of `diffusion-gym`."""

    def make(out, agent="ddpo_is", reward="Brightness", **options):
        given = {
            "env": "scale_out_rewards:DiffusionDenoise-v0",
            "agent": agent,
            "preset": "ddpo-paper",
            "env.model": tiny_pipeline,
            "env.reward": reward,
            "env.num-inference-steps": 3,
            "env.guidance-scale": 2.0,
            "out": out,
            "seed": 3,
            "total-reward-queries": SAMPLES * ITERATIONS,
            "samples-per-iteration": SAMPLES,
            "rollout-batch": BATCH,
            "checkpoint-every": 1,
            "keep-checkpoints": 9,
            "agent.trainable": "full",
            "agent.mixed-precision": "no",
            "agent.learning-rate": 1e-3,
            "agent.adam-epsilon": 1e-3,  # smaller ones blow up the rounding of gradients that are almost 0
            **{f"agent.{key}": value for key, value in OPTIONS.get(agent, {}).items()},
            **{key.replace("_", "-"): value for key, value in options.items()},
        }
        if agent in ("ddpo_sf", "ddpo_is"):
            given |= {"agent.normalization": "prompt", "agent.statistics-min-count": 4}
        return ["train", "--env.prompts", "a red circle", "two blue stars"] + [
            text for key, value in given.items() for text in (f"--{key}", str(value))
        ]

    return make


class Run:
    """What a run folder holds: metrics without clocks, and the newest checkpoint."""

    def __init__(self, folder):
        records = [json.loads(line) for line in self.lines(folder)]
        self.rows = [{key: value for key, value in record.items() if key not in CLOCKS} for record in records]
        self.checkpoints = sorted(path.name for path in (folder / "checkpoints").iterdir())
        newest = folder / "checkpoints" / self.checkpoints[-1]
        self.tensors = load_file(newest)
        self.state = json.loads(tensors_metadata(newest)["state"])

    @staticmethod
    def lines(folder):
        return (folder / "metrics.jsonl").read_text().splitlines()


def assert_close(found, expected, name):
    largest = float(expected.double().abs().nan_to_num().max())
    tolerances = {"rtol": 1e-4, "atol": 2e-6 * max(1.0, largest), "equal_nan": True}
    torch.testing.assert_close(found, expected, **tolerances, msg=lambda text: f"{name}: {text}")


def assert_same(found, expected):
    """Up to the rounding of sums that are taken in another order."""
    assert found.checkpoints == expected.checkpoints
    for ours, theirs in zip(found.rows, expected.rows, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
        assert ours["reward_mean"] == pytest.approx(theirs["reward_mean"], abs=1e-6)
    for key in ("reward_mean", "reward_std", "red_mean"):  # sampled with weights that have seen no sum yet
        assert found.rows[0][key] == expected.rows[0][key]
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert_close(found.tensors[name], tensor, name)
    assert found.state["agent"].keys() == expected.state["agent"].keys()
    if "prompt_statistics" in expected.state["agent"]:
        ours, theirs = found.state["agent"]["prompt_statistics"], expected.state["agent"]["prompt_statistics"]
        assert list(ours) == list(theirs)
        for prompt, rewards in theirs.items():
            assert ours[prompt] == pytest.approx(rewards, abs=1e-6)


@pytest.fixture(scope="module")
def train(in_processes, arguments, rewards_folder):
    """`train(count, out, ...)`: exit codes, outputs and the agents of `count` forked processes."""

    def run(count, out, *extra, before=None, resume=False, **options):
        command = ["train", "--resume", "--out", str(out)] if resume else arguments(out, **options)

        def child(processes):
            sys.path.insert(0, str(rewards_folder))
            torch.set_num_threads(1)
            if before is not None:
                before(processes)
            agents, build = [], runs.build_agent
            runs.build_agent = lambda *given: agents.append(build(*given)) or agents[0]
            shown, errors, code = io.StringIO(), io.StringIO(), 0
            with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(errors):
                try:
                    main([*command, *extra])
                except SystemExit as stop:
                    code = stop.code
                except Exception as error:
                    code = f"{type(error).__name__}: {error}"
            weights = [weight.detach().flatten() for agent in agents for weight in agent.parameters]
            digest = hashlib.sha256(torch.cat(weights).numpy().tobytes()).hexdigest() if weights else ""
            state = [agent.state() for agent in agents]
            return {"code": code, "out": shown.getvalue(), "err": errors.getvalue(), "agent": [digest, state]}

        return in_processes(count, child)

    return run


@pytest.fixture(scope="module")
def alone(train, tmp_path_factory):
    """`alone(agent, ...)`: the folder of the run that one process makes with these options."""
    folders = {}

    def run(**options):
        key = json.dumps(options, sort_keys=True)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("alone") / "run"
            assert codes(train(1, folders[key], **options)) == [0]
        return folders[key]

    return run


def codes(results):
    return [result["code"] for result in results]


# --- sampling --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one_step, group", [(False, 1), (False, 2), (True, 1)])
@pytest.mark.parametrize("count", [2, 4])
def test_the_processes_sample_what_one_would(make_env, make_policy, one_step, group, count):
    env = make_env(2, autoreset_mode="Disabled")
    policy = make_policy(env)
    env = OneStepVectorEnv(env) if one_step else env
    whole = collect_many(env, policy, 8, (7, 0), group_size=group)
    parts = [
        collect_many(env, policy, 8, (7, 0), group_size=group, processes=Processes(index, count))
        for index in range(count)
    ]
    joined = Trajectories.join(parts)
    assert joined.prompts == whole.prompts
    for name in ("tokens", "latents", "log_probs", "rewards", "images"):
        assert torch.equal(getattr(joined, name), getattr(whole, name))
    noises = [part.latents[0][row] for part in parts for row in range(len(part))]
    assert len({noise.numpy().tobytes() for noise in noises}) == 8


# --- the same result -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("agent", sorted(AGENTS))
def test_two_processes_equal_one(train, alone, tmp_path, agent):
    results = train(2, tmp_path / "run", agent=agent)
    assert codes(results) == [0, 0]
    assert results[0]["agent"] == results[1]["agent"]  # bit for bit, statistics included
    assert_same(Run(tmp_path / "run"), Run(alone(agent=agent)))


def test_processes_without_a_share_in_a_minibatch(train, alone, tmp_path):
    """A batch of one trajectory is one process's; the others have nothing to back-propagate."""
    options = {"agent.batch-size": 1, "agent.max-grad-norm": 1e-2, "total-reward-queries": SAMPLES}
    assert codes(train(4, tmp_path / "run", **options)) == [0] * 4
    assert_same(Run(tmp_path / "run"), Run(alone(**options)))


@pytest.mark.parametrize("agent", ["ddpo_is", "dpok", "rwr_sparse"])
def test_samples_whose_reward_failed_are_left_out_alike(train, alone, tmp_path, agent):
    """Of every two pictures the brighter one has no reward."""
    one = Run(alone(agent=agent, reward="PartlyMissing"))
    assert [row["samples_dropped"] for row in one.rows] == [SAMPLES // 2] * ITERATIONS
    assert codes(train(2, tmp_path / "run", agent=agent, reward="PartlyMissing")) == [0, 0]
    assert_same(Run(tmp_path / "run"), one)


@pytest.mark.parametrize("agent, first, second", [("ddpo_is", 2, 1), ("dpok", 2, 2), ("dpok", 2, 1), ("dpok", 1, 4)])
def test_a_run_goes_on_with_any_number_of_processes(train, alone, tmp_path, agent, first, second):
    part, whole = tmp_path / "part", tmp_path / "whole"
    assert codes(train(first, part, agent=agent, total_reward_queries=2 * SAMPLES)) == [0] * first
    resumed = train(second, part, "--total-reward-queries", str(SAMPLES * ITERATIONS), resume=True)
    assert codes(resumed) == [0] * second
    assert all(result["agent"] == resumed[0]["agent"] for result in resumed)
    assert_same(Run(part), Run(alone(agent=agent)))
    if first == second:
        train(first, whole, agent=agent)
        found, expected = Run(part), Run(whole)
        assert found.rows == expected.rows and found.state == expected.state
        assert all(torch.equal(found.tensors[name], value) for name, value in expected.tensors.items())


# --- what is written -------------------------------------------------------------------------------------------


def files(folder):
    """All files under a folder, but for the names of tensorboard's, which hold the time."""
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return sorted("tensorboard" if name.startswith("tensorboard/") else name for name in names)


def test_the_main_process_alone_writes_and_speaks(train, alone, tmp_path):
    run = tmp_path / "run"

    def guard(event, given):
        if event == "open" and str(run) in str(given[0]) and given[2] & (os.O_WRONLY | os.O_RDWR):
            raise PermissionError(f"process 1 writes {given[0]}")

    def watch(processes):
        if not processes.main:
            sys.addaudithook(guard)

    main_one, other = train(2, run, before=watch, pictures_every=1)
    assert (main_one["code"], other["code"]) == (0, 0), other["err"]
    assert files(run) == files(alone(pictures_every=1))
    assert [row["iteration"] for row in Run(run).rows] == [1, 2, 3]
    assert "3 iterations, 24 reward queries" in main_one["out"]
    assert other["out"] == other["err"] == ""


# --- failures --------------------------------------------------------------------------------------------------


def assert_kept(folder, whole):
    """The folder holds the state after the first iteration, and nothing newer."""
    kept, first = Run(folder), whole / "checkpoints" / "iteration-000001.safetensors"
    assert kept.checkpoints == [first.name] and len(kept.rows) == 1
    for name, value in load_file(first).items():
        assert_close(kept.tensors[name], value, name)


def test_a_reward_that_fails_in_one_process_ends_all(train, alone, tmp_path):
    main_one, failing = train(2, tmp_path / "run", reward="Broken", checkpoint_every=10)
    assert (main_one["code"], failing["code"]) == (2, 2)
    reason = "raised ConnectionError: reward server gone"
    assert f"error: process 1 of 2 failed: RewardError: reward='reward' {reason}" in main_one["err"]
    assert failing["err"].strip() == f"error: reward='reward' {reason}"
    assert main_one["agent"] == failing["agent"]
    assert_kept(tmp_path / "run", alone(agent="ddpo_is"))


def test_a_bug_while_sampling_in_one_process_ends_all(train, alone, tmp_path):
    """DPOK's checkpoint gathers the replay buffer: both processes must come to it."""

    def breaks(processes):
        calls, genuine = [], policy_gradient.collect_many

        def sample(*given, **options):
            calls.append(None)
            if processes.index == 1 and len(calls) == 2:
                raise RuntimeError("CUDA error: an illegal memory access")
            return genuine(*given, **options)

        policy_gradient.collect_many = sample

    results = train(2, tmp_path / "run", agent="dpok", before=breaks, checkpoint_every=10)
    assert codes(results) == [2, "RuntimeError: CUDA error: an illegal memory access"]
    assert "process 1 of 2 failed: RuntimeError: CUDA error: an illegal memory access" in results[0]["err"]
    assert_kept(tmp_path / "run", alone(agent="dpok"))


def test_an_iteration_without_a_usable_reward_ends_all(train, alone, tmp_path):
    results = train(2, tmp_path / "run", reward="Nothing", checkpoint_every=10)
    assert codes(results) == [2, 2]
    for result in results:
        assert f"error: all {SAMPLES} rewards of the iteration are NaN or infinite" in result["err"]
    assert_kept(tmp_path / "run", alone(agent="ddpo_is"))


def test_a_full_disk_ends_all(train, tmp_path):
    def fill(processes):
        def full(*given):
            raise OSError(28, "No space left on device")

        checkpoint.save_tensors = full

    results = train(2, tmp_path / "run", before=fill)
    assert codes(results) == [2, 2]
    assert "error: [Errno 28] No space left on device" in results[0]["err"]
    assert results[1]["err"] == ""  # the main process has said it


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rollout_batch": 4, "samples_per_iteration": 12}, "3 rollout batches an iteration cannot be shared evenly"),
        ({"rollout_batch": 8}, "make samples_per_iteration a multiple of rollout_batch times 2, or rollout_batch sm"),
    ],
)
def test_samples_that_cannot_be_shared_are_refused_once(train, tmp_path, options, message):
    results = train(2, tmp_path / "run", **options)
    assert codes(results) == [2, 2]
    assert results[0]["err"].count("\n") == 1 and message in results[0]["err"]
    assert results[1]["err"] == ""
    assert not (tmp_path / "run").exists()


def test_a_taken_run_folder_is_refused_once(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    results = train(2, tmp_path / "run")
    assert codes(results) == [2, 2]
    assert "is not empty and no run of diffusion-gym" in results[0]["err"] and results[1]["err"] == ""
    assert files(tmp_path / "run") == ["thesis.txt"]


def test_a_device_that_only_one_process_could_have_is_refused(train, tmp_path):
    results = train(2, tmp_path / "run", **{"env.device": "cuda:0"})
    assert codes(results) == [2, 2]
    assert "device='cuda:0' cannot be had by all 2 processes, of which this one runs on cpu" in results[0]["err"]
    assert not (tmp_path / "run").exists()


# --- gradients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_scaling", [False, True])
def test_the_optimiser_takes_the_mean_over_uneven_shares(in_processes, loss_scaling):
    """Three processes with 4, 0 and 1 of 5 items, against AdamW on the mean loss of all; the first has the fewest."""
    generator = torch.Generator().manual_seed(0)
    x, y, start = torch.randn(5, 3, generator=generator), torch.randn(5, generator=generator), torch.ones(3)
    shares = [[], [0, 2, 3, 4], [1]]

    def step(processes):
        weight, unused = torch.nn.Parameter(start.clone()), torch.nn.Parameter(torch.ones(2))
        options = OptimizerOptions(0.1, epsilon=1e-3, max_grad_norm=0.5, loss_scaling=loss_scaling)
        optimizer = AccumulatingOptimizer({"weight": weight, "unused": unused}, options, processes)

        def losses(items):
            error = x[items] @ weight - y[items]
            return {"loss": error**2, "error": error.detach()}

        items = torch.tensor(shares[processes.index], dtype=torch.int64)
        rows = [optimizer.step(items, losses, 5) for _ in range(3)]
        return [weight.tolist(), [{key: value.item() for key, value in row.items()} for row in rows]]

    weight = torch.nn.Parameter(start.clone())
    adam = torch.optim.AdamW([weight], 0.1, eps=1e-3, weight_decay=1e-4)
    expected = []
    for _ in range(3):
        error = x @ weight - y
        adam.zero_grad()
        error.square().mean().backward()
        norm = torch.nn.utils.clip_grad_norm_([weight], 0.5)
        adam.step()
        expected.append([error.square().mean().item(), error.mean().item(), norm.item()])
    found = in_processes(3, step)
    assert found[0] == found[1] == found[2]
    weights, rows = found[0]
    assert weights == pytest.approx(weight.tolist(), rel=1e-5)
    for row, numbers in zip(rows, expected, strict=True):
        assert [row["loss"], row["error"], row["grad_norm"]] == pytest.approx(numbers, rel=1e-5)


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_torch_ddp_around_the_policy_gives_the_gradient_of_the_whole(
    in_processes, make_env, make_policy, roll, trainable
):
    """Two processes with half of the transitions each; `forward` is the path that DDP wraps."""
    env = make_env(4, num_inference_steps=3)
    policy = make_policy(env, trainable)
    rolled = roll(env, policy)
    samples, steps = torch.arange(4).repeat(3), torch.arange(3).repeat_interleave(4)
    signs = torch.linspace(-1, 1, len(steps))

    def gradient(forward, part):
        policy.zero_grad()
        log_prob = forward(rolled.states(samples[part], steps[part]), rolled.actions(samples[part], steps[part]))
        (signs[part] * log_prob).mean().backward()
        return torch.cat([p.grad.flatten() for p in policy.trainable_parameters().values()])

    def with_ddp(processes):
        wrapped = torch.nn.parallel.DistributedDataParallel(policy)
        ddp = gradient(wrapped, slice(processes.index, None, 2))
        assert not wrapped.module.unet.training
        alone = gradient(policy, slice(processes.index, None, 2))
        return [ddp.tolist(), alone.tolist()]

    whole = gradient(policy, slice(None))
    assert whole.norm() > 0.01
    for ddp, alone in in_processes(2, with_ddp):
        assert (torch.tensor(ddp) - whole).norm() < 1e-4 * whole.norm()
        assert (torch.tensor(alone) - whole).norm() > 0.1 * whole.norm()  # half of it is something else


# --- through the launchers -------------------------------------------------------------------------------------


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

    def start(arguments, count, launcher="accelerate", machine=None, port=None):
        env = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "TORCHELASTIC_"))}
        env |= {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        line = [sys.executable, "-m", *command(count, port or free_port(), launcher, machine)]
        line += ["-m", "diffusion_gym.agents.cli", *arguments]
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


def test_accelerate_launch_ends_when_one_process_fails(launch, arguments, alone, rewards_folder, tmp_path):
    code, output = ended(launch(arguments(tmp_path / "run", reward="Broken", checkpoint_every=10), 2))
    assert time.time() - (rewards_folder / "failed").stat().st_mtime < 30
    assert code != 0
    reason = "reward='reward' raised ConnectionError: reward server gone"
    assert output.count(f"error: process 1 of 2 failed: RewardError: {reason}") == 1
    assert output.count(f"error: {reason}") == 1
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
def test_a_launched_run_is_resumed(launch, arguments, alone, train, tmp_path, agent):
    part, queries = tmp_path / "part", SAMPLES * ITERATIONS
    assert ended(launch(arguments(part, agent=agent, total_reward_queries=SAMPLES), 2))[0] == 0
    line = ["train", "--resume", "--out", str(part), "--total-reward-queries", str(queries)]
    code, output = ended(launch(line, 2))
    assert code == 0, output
    train(2, tmp_path / "whole", agent=agent)
    found, expected = Run(part), Run(tmp_path / "whole")
    assert found.rows == expected.rows and found.state == expected.state
    assert all(torch.equal(found.tensors[name], value) for name, value in expected.tensors.items())
    assert_same(found, Run(alone(agent=agent)))


@pytest.mark.slow
def test_a_killed_process_ends_all(launch, arguments, alone, rewards_folder, tmp_path):
    code, output = ended(launch(arguments(tmp_path / "run", reward="Killed"), 2))
    assert time.time() - (rewards_folder / "failed").stat().st_mtime < 30
    assert code != 0 and "Signal 9 (SIGKILL) received" in output
    assert_kept(tmp_path / "run", alone(agent="ddpo_is"))


@pytest.mark.slow
def test_ctrl_c_of_the_launcher_ends_after_the_iteration(launch, arguments, tmp_path):
    options = {"total_reward_queries": 10_000 * SAMPLES, "checkpoint_every": 10_000}
    process = launch(arguments(tmp_path / "run", **options), 2)
    while not (tmp_path / "run" / "metrics.jsonl").exists() or not Run.lines(tmp_path / "run"):
        assert process.poll() is None
        time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, output = ended(process)
    assert output.count("Stopping after this iteration") == 1 and "Stopped early" in output
    run = Run(tmp_path / "run")
    assert run.checkpoints == [f"iteration-{len(run.rows):06d}.safetensors"]
