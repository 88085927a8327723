"""Runs killed with SIGKILL and resumed equal the uninterrupted one: real processes of the command line, every agent.

KILL_SEED=N repeats the moments of an earlier run; a failure prints its seed.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from diffusion_gym.agents.algorithms import AGENTS
from diffusion_gym.storage import is_unfinished, load_tensors, tensors_metadata
from run_folders import ITERATIONS, SAMPLES, carrying_arguments, metrics_lines, metrics_rows

pytestmark = pytest.mark.slow

KEPT = 2


def train_arguments(pipeline, out, name, checkpoint_every, **options):
    rhythm = {"--checkpoint-every": checkpoint_every, "--keep-checkpoints": KEPT, "--pictures-every": 2}
    words = (str(part) for pair in rhythm.items() for part in pair)
    return [*carrying_arguments(pipeline, name, out, **options), *words]


def start(arguments, *launcher):
    command = [sys.executable, *(launcher or ("-m", "diffusion_gym.agents.cli")), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(arguments, *launcher, code=0):
    process = start(arguments, *launcher)
    output = process.communicate(timeout=900)[0]
    assert process.returncode == code, output


def kill_at_random(process, out, rng):
    """SIGKILL at a random moment after a metrics line that this process has written; its exit code, lines written."""
    before = (out / "metrics.jsonl").stat().st_mtime_ns if (out / "metrics.jsonl").exists() else None
    done = max(checkpoints(out), default=0)
    number = rng.randint(done + 1, max(done + 1, ITERATIONS - 2))
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline and process.poll() is None:
        if len(metrics_lines(out)) >= number and (out / "metrics.jsonl").stat().st_mtime_ns != before:
            time.sleep(rng.uniform(0, 2) * json.loads(metrics_lines(out)[-1])["seconds"])
            break
        time.sleep(0.001)
    process.kill()
    process.communicate()
    return process.returncode, len(metrics_lines(out))


def checkpoints(out):
    """Iterations of the checkpoints, every one of which is whole."""
    folder = out / "checkpoints"
    paths = sorted(folder.glob("iteration-*")) if folder.exists() else []
    for path in paths:
        assert load_tensors(path)
        assert json.loads(tensors_metadata(path)["state"])["iteration"] == int(path.stem[-6:])
    return [int(path.stem[-6:]) for path in paths]


def unfinished(out):
    return [path for path in out.rglob(".*") if is_unfinished(path)]


def assert_equals(out, whole):
    """The run folders hold the same: metrics but for the clocks, checkpoints bit for bit, pictures, the model."""
    assert metrics_rows(out) == metrics_rows(whole) and len(metrics_rows(out)) == ITERATIONS
    assert len(checkpoints(out)) <= KEPT
    assert checkpoints(out)[-1] == ITERATIONS
    name = f"iteration-{ITERATIONS:06d}.safetensors"
    found, stored = (load_tensors(folder / "checkpoints" / name) for folder in (out, whole))
    assert found.keys() == stored.keys()
    assert [key for key, value in found.items() if not torch.equal(value, stored[key])] == []
    states = [json.loads(tensors_metadata(folder / "checkpoints" / name)["state"]) for folder in (out, whole)]
    assert states[0] == states[1]
    for part in ("images", "model"):
        contents, others = (
            {path.relative_to(folder): path.read_bytes() for path in (folder / part).rglob("*") if path.is_file()}
            for folder in (out, whole)
        )
        assert contents == others
    assert [path.name for path in out.rglob(".*")] == [".seal.json"]


@pytest.fixture(scope="module")
def whole(tiny_pipeline, tmp_path_factory):
    """`whole(name, **options)`: the folder of an uninterrupted run."""
    known = {}

    def run(name, **options):
        key = (name, *sorted(options.items()))
        if key not in known:
            known[key] = tmp_path_factory.mktemp("whole") / name
            finish(train_arguments(tiny_pipeline, known[key], name, 2, **options))
        return known[key]

    return run


@pytest.mark.parametrize("name", AGENTS)
def test_killed_twice_at_random(tiny_pipeline, whole, tmp_path, name):
    seed = int(os.environ.get("KILL_SEED", random.SystemRandom().randrange(10**6)))
    print(f"KILL_SEED={seed}")
    rng = random.Random(f"{seed} {name}")
    out = tmp_path / "run"
    arguments = train_arguments(tiny_pipeline, out, name, checkpoint_every=rng.choice([1, 2]))
    resume = ["train", "--resume", "--out", out]
    for step in (arguments, resume):
        print("killed:", kill_at_random(start(step), out, rng), checkpoints(out), unfinished(out))
        assert len(checkpoints(out)) <= KEPT + 1
    finish([*resume, "--total-reward-queries", ITERATIONS * SAMPLES])
    assert_equals(out, whole(name))


# Runs `diffusion-gym` and kills it at one point of the writing of one checkpoint.
KILLER = """
import os, signal, sys
from pathlib import Path
from diffusion_gym.agents import cli
from diffusion_gym.agents.training.checkpoint import Checkpoints

point, name, oldest = sys.argv[1:4]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def patch(kind, method, instead):
    genuine = getattr(kind, method)
    setattr(kind, method, lambda self, *args, **options: instead(genuine, self, *args, **options))

def save(genuine, self, agent, progress):
    if point == "measured" and name.startswith(f"iteration-{progress.iteration:06d}"):
        die()
    return genuine(self, agent, progress)

def write_bytes(genuine, self, data):
    if point == "half written" and self.name.startswith("." + name):
        genuine(self, data[: len(data) // 2])
        die()
    return genuine(self, data)

def replace(genuine, self, target):
    if point == "written" and Path(target).name == name:
        die()
    result = genuine(self, target)
    if point == "in place" and Path(target).name == name:
        die()
    return result

def unlink(genuine, self, **options):
    result = genuine(self, **options)
    if point == "old one gone" and self.name == oldest:
        die()
    return result

patch(Checkpoints, "save", save)
patch(Path, "write_bytes", write_bytes)
patch(Path, "replace", replace)
patch(Path, "unlink", unlink)
cli.main(sys.argv[4:])
"""


@pytest.mark.parametrize(
    ("point", "iteration", "left", "leftovers"),
    [
        ("measured", 5, [3, 4], 0),
        ("half written", 5, [3, 4], 1),
        ("written", 5, [3, 4], 1),
        ("in place", 5, [3, 4, 5], 0),
        ("old one gone", 5, [4, 5], 0),
        ("measured", 1, [], 0),
        ("half written", 1, [], 1),
        ("in place", 1, [1], 0),
    ],
)
def test_killed_while_a_checkpoint_is_written(tiny_pipeline, whole, tmp_path, point, iteration, left, leftovers):
    out, name = tmp_path / "run", f"iteration-{iteration:06d}.safetensors"
    oldest = f"iteration-{iteration - KEPT:06d}.safetensors"
    arguments = train_arguments(tiny_pipeline, out, "dpok", 1, replay_iterations=3)
    finish([point, name, oldest, *arguments], "-c", KILLER, code=-signal.SIGKILL)
    assert checkpoints(out) == left
    assert len(unfinished(out)) == leftovers
    finish(["train", "--resume", "--out", out])
    assert_equals(out, whole("dpok", replay_iterations=3))


def test_lost_checkpoints_are_no_early_kill(tiny_pipeline, tmp_path, whole):
    """Nothing is begun anew over a run whose checkpoints somebody removed."""
    out = tmp_path / "run"
    finish(train_arguments(tiny_pipeline, out, "ddpo_is", 2))
    for path in (out / "checkpoints").iterdir():
        path.unlink()
    before = metrics_lines(out)
    process = start(["train", "--resume", "--out", out])
    output = process.communicate(timeout=900)[0]
    assert process.returncode == 2 and "holds no checkpoint" in output
    assert metrics_lines(out) == before
