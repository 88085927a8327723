"""A network spread over two processes trains as one does, and its files are those of any run."""

import shutil

import pytest
import torch

from diffusion_gym.agents.algorithms import AGENTS
from scale_out_runs import ITERATIONS, SAMPLES, Run, assert_same, codes, files

WHOLE = {"agent.micro-batch-size": 2}
SHARDED = {"agent.sharding": "fsdp2", **WHOLE}
DEVELOPED = {"agent.ema-decay": 0.9, "development-every": 2, "development-samples": 4}


@pytest.fixture(scope="module")
def sharded(train, tmp_path_factory):
    """`sharded(trainable)`: the folder of a run of two processes with a part of the network each."""
    folders = {}

    def run(trainable):
        if trainable not in folders:
            folders[trainable] = tmp_path_factory.mktemp("sharded") / "run"
            options = {"agent.trainable": trainable, **SHARDED, **DEVELOPED}
            results = train(2, folders[trainable], **options)
            assert codes(results) == [0, 0], results
            assert results[0]["out"].count("3 iterations, 24 reward queries") == 1 and results[1]["out"] == ""
        return folders[trainable]

    return run


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_two_processes_with_a_part_of_the_network_each_equal_one(sharded, alone, trainable):
    folder, whole = sharded(trainable), alone(**{"agent.trainable": trainable, **WHOLE, **DEVELOPED})
    assert files(folder) == files(whole)
    assert_same(Run(folder), Run(whole), same_layout=False)


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("count", [2, 1])
def test_a_sharded_run_that_was_killed_goes_on_with_any_number_of_processes(train, sharded, tmp_path, trainable, count):
    whole, part = sharded(trainable), tmp_path / "part"
    shutil.copytree(whole, part, ignore=shutil.ignore_patterns("iteration-000003.*", "model"))
    assert codes(train(count, part, resume=True)) == [0] * count
    found, expected = Run(part), Run(whole)
    assert_same(found, expected, same_layout=False)
    if count == 2:
        assert found.rows == expected.rows and found.state == expected.state
        assert all(torch.equal(found.tensors[name], value) for name, value in expected.tensors.items())


OPTIONS = {"ddpo_is": {"agent.trust-region": "divergence"}}
QUICK = ("dpok", "dgpo")


@pytest.mark.parametrize(
    "agent", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in sorted(AGENTS)]
)
def test_every_agent_trains_a_network_that_is_spread(train, alone, tmp_path, agent):
    options = {"agent": agent, "total-reward-queries": 2 * SAMPLES, "pictures-every": 0}
    assert codes(train(2, tmp_path / "run", **SHARDED, **options)) == [0, 0]
    assert_same(Run(tmp_path / "run"), Run(alone(**WHOLE, **options)), same_layout=False)
