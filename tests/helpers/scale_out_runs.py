"""Sizes, options and rewards of the trainings of several processes, and how their results are compared."""

import json

import pytest
import torch
from safetensors.torch import load_file

from diffusion_gym.storage import tensors_metadata
from run_folders import metrics_rows

SAMPLES, BATCH, ITERATIONS = 8, 2, 3


REWARDS_MODULE = '''
import os, pathlib, signal, threading, torch
from diffusion_gym.rewards import REWARDS, RewardOutput

RANK, FIRST_ITERATION = os.environ.get("RANK", "0"), {batches} // int(os.environ.get("WORLD_SIZE", "1"))

def register(name, act, ranks):
    """Brightness of most pictures; in the processes `ranks`, after the first iteration, what `act` makes of it."""
    def make():
        calls = []
        def reward(images, prompts, metadata):
            calls.append(None)
            scores = images.mean((1, 2, 3))
            if set(prompts) == {{"two blue stars"}}:  # then the brighter picture of the batch has no reward
                scores = scores.where(scores < scores.amax(), torch.nan)
            parts = {{"red": images[:, 0].mean((1, 2)), **({{"odd": scores}} if RANK == "1" else {{}})}}
            return RewardOutput(act(scores) if RANK in ranks and len(calls) > FIRST_ITERATION else scores, parts)
        return reward
    REWARDS.register(name)(make)

def broken(scores):
    pathlib.Path(__file__).with_name("failed").touch()
    raise ConnectionError("reward server gone")

def killed(scores):
    pathlib.Path(__file__).with_name("failed").touch()
    os.kill(os.getpid(), signal.SIGKILL)

def exits(scores):
    raise SystemExit(3)

register("Patchy", None, "")
register("Exits", exits, "1")
def hangs(scores):
    threading.Event().wait(600)

def hangs_when_asked(scores):
    os.kill(os.getpid(), signal.SIGTERM)
    hangs(scores)

register("Hangs", hangs, "1")
register("HangsWhenAsked", hangs_when_asked, "1")
register("AllHangWhenAsked", hangs_when_asked, "01")
register("KilledMain", killed, "0")
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
    "nft": {"inner-epochs": 2, "batch-size": 5, "behaviour-growth": 0.1},
    "awm": {"batch-size": 4, "normalization": "group", "group-size": 2, "behaviour-growth": 0.1},
    "dgpo": {"batch-size": 4, "group-size": 2, "behaviour-growth": 0.1},
    "online_dpo": {"batch-size": 4, "group-size": 2, "kl-weight": 0.1},
    "reward_gradient": {"batch-size": 5, "truncation": 2},
}

# Samples that each iteration does without: in two iterations rewards failed, in groups in all three; a pair lacks both.
_IN_GROUPS = [3, 2, 2]
DROPPED = {
    "ddpo_iskl": _IN_GROUPS,
    "awm": _IN_GROUPS,
    "dgpo": _IN_GROUPS,
    "online_dpo": [2 * failed for failed in _IN_GROUPS],
    "reward_gradient": [0, 0, 0],
}


class Run:
    """What a run folder holds: metrics without clocks, and the newest checkpoint."""

    def __init__(self, folder):
        self.rows = metrics_rows(folder)
        self.checkpoints = sorted(path.name for path in (folder / "checkpoints").iterdir())
        newest = folder / "checkpoints" / self.checkpoints[-1]
        self.tensors = load_file(newest)
        self.state = json.loads(tensors_metadata(newest)["state"])


def assert_close(found, expected, name):
    largest = float(expected.double().abs().nan_to_num().max())
    tolerances = {"rtol": 1e-4, "atol": 2e-6 * max(1.0, largest), "equal_nan": True}
    torch.testing.assert_close(found, expected, **tolerances, msg=lambda text: f"{name}: {text}")


def assert_same(found, expected, same_layout=True):
    """Up to the rounding of sums that are taken in another order; `same_layout` of weights in memory for the first."""
    assert found.checkpoints == expected.checkpoints
    for ours, theirs in zip(found.rows, expected.rows, strict=True):
        # A loss is a sum of terms that nearly cancel, so that the order of its sum shows more.
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3, abs=1e-6)
        others = [{name: value for name, value in row.items() if name != "loss"} for row in (ours, theirs)]
        assert others[0] == pytest.approx(others[1], rel=1e-4, abs=1e-6)
        assert ours["reward_mean"] == pytest.approx(theirs["reward_mean"], abs=1e-6)
    for key in ("reward_mean", "reward_std", "red_mean"):  # sampled with weights that have seen no sum yet
        tolerance = 0 if same_layout else 1e-6  # of rewards in [0, 1]
        assert found.rows[0][key] == pytest.approx(expected.rows[0][key], rel=0, abs=tolerance)
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert_close(found.tensors[name], tensor, name)
    assert found.state["agent"].keys() == expected.state["agent"].keys()
    if "prompt_statistics" in expected.state["agent"]:
        ours, theirs = found.state["agent"]["prompt_statistics"], expected.state["agent"]["prompt_statistics"]
        assert list(ours) == list(theirs)
        for prompt, rewards in theirs.items():
            assert ours[prompt] == pytest.approx(rewards, abs=1e-6)


def codes(results):
    return [result["code"] for result in results]


def told(results):
    """The lines that say an error, of all processes that are still there."""
    lines = [line for result in results if result for line in result["err"].splitlines()]
    return [line for line in lines if line.startswith("error: ")]


def files(folder):
    """All files under a folder, but for the names of tensorboard's, which hold the time."""
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return sorted("tensorboard" if name.startswith("tensorboard/") else name for name in names)


def assert_kept(folder, whole):
    """The folder holds the state after the first iteration, and nothing newer."""
    kept, first = Run(folder), whole / "checkpoints" / "iteration-000001.safetensors"
    assert kept.checkpoints == [first.name] and len(kept.rows) == 1
    for name, value in load_file(first).items():
        assert_close(kept.tensors[name], value, name)
