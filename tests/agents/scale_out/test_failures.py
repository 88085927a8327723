"""Several processes fail together, say so once, and leave the checkpoint of what was learned."""

import re

import pytest

from diffusion_gym.agents import checkpoint
from diffusion_gym.agents.algorithms import policy_gradient
from scale_out_runs import SAMPLES, assert_kept, codes, files


def test_a_reward_that_fails_in_one_process_ends_all(train, alone, tmp_path):
    main_one, failing = train(2, tmp_path / "run", reward="Broken", checkpoint_every=10)
    assert (main_one["code"], failing["code"]) == (2, 2)
    reason = "raised ConnectionError: reward server gone"
    assert f"error: process 1 of 2 failed: RewardError: reward='reward' {reason}" in main_one["err"]
    assert re.fullmatch(rf"error: reward='reward' {reason} \(scale_out_rewards\.py:\d+\)", failing["err"].strip())
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
    assert "error: the system: No space left on device" in results[0]["err"]
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
