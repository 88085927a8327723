"""Checkpoints: which are kept, what a full disk leaves, and files that are none of this run."""

import errno
import os
from pathlib import Path

import pytest
import torch

from diffusion_gym.agents.algorithms import DDPOIS
from diffusion_gym.agents.training.checkpoint import Checkpoints, Progress
from diffusion_gym.storage import save_tensors
from diffusion_gym.testing.random_pipeline import write_random_pipeline
from run_folders import file_names


@pytest.mark.parametrize("keep, expected", [(1, [12]), (3, [10, 11, 12]), (20, list(range(1, 13)))])
def test_the_newest_checkpoints_are_kept(make_agent, tmp_path, keep, expected):
    agent, checkpoints = make_agent(), Checkpoints(tmp_path, keep)
    for iteration in range(1, 13):
        checkpoints.save(agent, Progress(iteration, iteration * 8))
    assert file_names(tmp_path) == [f"iteration-{i:06d}.safetensors" for i in expected]
    assert checkpoints.load(agent) == Progress(12, 12 * 8)


def test_a_checkpoint_is_written_before_an_old_one_goes(make_agent, tmp_path, monkeypatch):
    agent = make_agent()
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(agent, Progress(1, 8))

    def full(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(agent, Progress(2, 16))
    assert file_names(tmp_path) == ["iteration-000001.safetensors"]
    assert checkpoints.load(make_agent()) == Progress(1, 8)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_checkpoint_is_named(make_agent, tmp_path, share):
    agent = make_agent()
    path = Checkpoints(tmp_path).save(agent, Progress(1, 8))
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    other = make_agent(scale=0.5)
    before = other.tensors()
    with pytest.raises(ValueError, match=r"iteration-000001\.safetensors is truncated or not a safetensors file"):
        Checkpoints(tmp_path).load(other)
    assert all(torch.equal(value, before[key]) for key, value in other.tensors().items())


@pytest.mark.parametrize(
    "metadata", [None, {"format": "pt"}, {"format": "diffusion-gym-checkpoint-999", "state": "{}"}]
)
def test_a_safetensors_file_of_another_program_is_named(make_agent, tmp_path, metadata):
    path = tmp_path / "iteration-000001.safetensors"
    save_tensors(path, {"weight": torch.zeros(3)}, metadata)
    with pytest.raises(ValueError, match=r"iteration-000001\.safetensors' is no checkpoint of diffusion-gym"):
        Checkpoints(tmp_path).load(make_agent())


def test_a_file_that_is_no_safetensors_is_named(make_agent, tmp_path):
    (tmp_path / "iteration-000001.safetensors").write_bytes(b"PK\x03\x04" + bytes(200))
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        Checkpoints(tmp_path).load(make_agent())


@pytest.mark.parametrize(
    "trainable, rank, other_trainable, other_rank",
    [("lora", 2, "lora", 4), ("lora", 4, "full", 4), ("full", 4, "lora", 4)],
)
def test_a_checkpoint_of_another_policy_is_named(make_policy, tmp_path, trainable, rank, other_trainable, other_rank):
    agents = [
        DDPOIS(make_policy(trainable=kind, lora_rank=number), DDPOIS.Config())
        for kind, number in ((trainable, rank), (other_trainable, other_rank))
    ]
    Checkpoints(tmp_path).save(agents[0], Progress(1, 8))
    before = {key: value.clone() for key, value in agents[1].tensors().items()}
    with pytest.raises(ValueError, match="does not fit this run.*another policy; check the model, trainable"):
        Checkpoints(tmp_path).load(agents[1])
    assert all(torch.equal(value, before[key]) for key, value in agents[1].tensors().items())


def test_an_empty_folder_holds_no_checkpoint(make_agent, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        Checkpoints(tmp_path / "nothing").load(make_agent())


def test_another_model_is_refused_and_changes_nothing(make_env, make_agent, perturb, tmp_path):
    checkpoints, agent = Checkpoints(tmp_path / "run"), make_agent(make_env())
    perturb(agent.policy)
    checkpoints.save(agent, Progress(1, 8))
    other = make_agent(make_env(model=str(write_random_pipeline(tmp_path / "model", seed=1))))
    before = {name: value.clone() for name, value in other.tensors().items()}
    with pytest.raises(ValueError, match=r"does not fit this run: model='.*model' is not as it was: .*train anew"):
        checkpoints.load(other)
    assert all(torch.equal(value, before[name]) for name, value in other.tensors().items())
    assert checkpoints.load(make_agent(make_env())) == Progress(1, 8)
