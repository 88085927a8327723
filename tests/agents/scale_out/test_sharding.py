"""A network spread over two processes trains as one does, and its files are those of any run."""

import gc
import shutil

import diffusers
import pytest
import torch

from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.agents.algorithms import AGENTS, DDPOIS
from diffusion_gym.agents.training.trainer import Schedule, Trainer
from scale_out_runs import SAMPLES, Run, assert_same, codes, files, told

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
@pytest.mark.parametrize("count", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_a_sharded_run_that_was_killed_goes_on_with_any_number_of_processes(train, sharded, tmp_path, trainable, count):
    whole, part = sharded(trainable), tmp_path / "part"
    shutil.copytree(whole, part, ignore=shutil.ignore_patterns("iteration-000003.*", "model"))
    assert codes(train(count, part, resume=True)) == [0] * count
    found, expected = Run(part), Run(whole)
    assert_same(found, expected, same_layout=False)
    if count == 2:
        assert found.rows == expected.rows and found.state == expected.state
        assert all(torch.equal(found.tensors[name], value) for name, value in expected.tensors.items())


def test_a_full_training_is_exported_for_plain_diffusers(sharded, tiny_pipeline):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(sharded("full") / "model")
    found, stored = pipe.unet.state_dict(), Run(sharded("full")).tensors
    for name, value in stored.items():
        if name.startswith("average."):  # of the weights, which is what evaluation uses
            torch.testing.assert_close(found[name.removeprefix("average.")], value, rtol=0, atol=0)
    assert found.keys() == diffusers.StableDiffusionPipeline.from_pretrained(tiny_pipeline).unet.state_dict().keys()


QUICK = ("dpok",)


@pytest.mark.parametrize(
    "agent", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in sorted(AGENTS)]
)
def test_every_agent_trains_a_network_that_is_spread(train, alone, tmp_path, agent):
    options = {"agent": agent, "total-reward-queries": 2 * SAMPLES, "pictures-every": 0}
    assert codes(train(2, tmp_path / "run", **SHARDED, **options)) == [0, 0]
    assert_same(Run(tmp_path / "run"), Run(alone(**WHOLE, **options)), same_layout=False)


@pytest.mark.slow
@pytest.mark.parametrize("extra", [{"agent.cfg-training": False}, {"agent.gradient-checkpointing": True}], ids=str)
def test_ways_of_computing_the_network(train, alone, tmp_path, extra):
    options = {"total-reward-queries": SAMPLES, "agent.mixed-precision": "no"}
    flags = [f"--agent.{'' if on else 'no-'}{name.removeprefix('agent.')}" for name, on in extra.items()]
    assert codes(train(2, tmp_path / "run", *flags, **SHARDED, **options)) == [0, 0]
    assert codes(train(1, tmp_path / "one", *flags, **WHOLE, **options)) == [0]
    assert_same(Run(tmp_path / "run"), Run(tmp_path / "one"), same_layout=False)


def test_a_process_that_fails_ends_the_others(train, alone, tmp_path):
    """It cannot tell them, as they are in the midst of the network; the last checkpoint stands."""
    results = train(2, tmp_path / "run", reward="Broken", checkpoint_every=1, **SHARDED)
    assert codes(results) == [2, 2]
    (line,) = told(results)
    assert line.startswith("error: reward='reward' raised ConnectionError: reward server gone")
    assert "a checkpoint keeps iteration 1, go on with: diffusion-gym train --resume --out" in line
    kept, first = Run(tmp_path / "run"), Run(alone(**WHOLE, **{"total-reward-queries": SAMPLES}))
    assert kept.checkpoints == first.checkpoints == ["iteration-000001.safetensors"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"micro_batch_size": 0}, "micro_batch_size=0 does not go with sharding='fsdp2'.*give a micro_batch_size"),
        (
            {"trainable": "full", "mixed_precision": "fp16"},
            "mixed_precision='fp16' does not go with trainable='full' and",
        ),
        ({"sharding": "ddp"}, "sharding='ddp' must be one of none, fsdp2"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DDPOIS.Config(**{"sharding": "fsdp2", "micro_batch_size": 2, **options})


def test_a_model_whose_network_was_spread_is_not_there_for_another_policy(make_env, in_processes):
    env = make_env(2)

    def child(processes):
        policy = DenoisingPolicy.from_env(env)
        DDPOIS(policy, DDPOIS.Config(sharding="fsdp2", micro_batch_size=2), processes)
        try:
            DenoisingPolicy.from_env(env)
        except ValueError as error:
            told = str(error)
        same = make_env(2).unwrapped.model is env.unwrapped.model
        del policy
        gc.collect()
        return [told, same, DenoisingPolicy.from_env(make_env(2)).model is env.unwrapped.model]

    for said, while_held, after in in_processes(2, child):
        assert "has its network spread over processes by another policy" in said and while_held and not after


def test_pictures_in_one_process_alone_are_refused(make_env, in_processes, tmp_path):
    env = make_env(2, autoreset_mode="Disabled")

    def child(processes):
        agent = DDPOIS(DenoisingPolicy.from_env(env), DDPOIS.Config(sharding="fsdp2", micro_batch_size=2), processes)
        try:
            Trainer(env, agent, tmp_path, Schedule(4, 4), pictures_env=env if processes.main else None)
        except ValueError as error:
            return str(error)

    told = in_processes(2, child)
    assert told == ["pictures_env is None in some processes only, but sharding has all sample; give it in all"] * 2
