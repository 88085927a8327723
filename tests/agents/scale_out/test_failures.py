"""Several processes fail together, say so once, and leave the checkpoint of what was learned."""

import re

import pytest

from diffusion_gym.agents.algorithms import base, policy_gradient
from diffusion_gym.agents.training import checkpoint, ending
from scale_out_runs import SAMPLES, assert_kept, codes, files, told


def stay_after_a_hang(processes):
    """Else the process would end before it has told this test of it."""
    ending.abandoned = lambda: False


FAILURES = {
    "raises": ("Broken", {}, r"raised ConnectionError: reward server gone \(scale_out_rewards\.py:\d+\)"),
    "exits": ("Exits", {}, r"raised SystemExit: 3 \(scale_out_rewards\.py:\d+\)"),
    "hangs": ("Hangs", {"env.reward-seconds": 5.0}, r": the reward has not returned for [\d.]+ s .*"),
}


@pytest.mark.parametrize("reward, options, reason", FAILURES.values(), ids=FAILURES)
def test_a_reward_that_fails_in_one_process_ends_all(train, alone, tmp_path, reward, options, reason):
    out = tmp_path / "run"
    results = train(2, out, reward=reward, checkpoint_every=10, before=stay_after_a_hang, **options)
    assert codes(results) == [2, 2]
    (line,) = told(results)
    assert re.fullmatch(
        rf"error: process 1 of 2 failed: RewardError: reward='reward' ?{reason}; a checkpoint keeps iteration 1, "
        rf"go on with: diffusion-gym train --resume --out {re.escape(str(out))}",
        line,
    )
    assert results[0]["agent"] == results[1]["agent"]
    assert_kept(out, alone(agent="ddpo_is"))


@pytest.mark.parametrize(
    "reward, expected, reason",
    [
        ("HangsWhenAsked", [2, 130], "process 1 of 2 failed: KeyboardInterrupt: "),
        ("AllHangWhenAsked", [130, 130], ""),
    ],
)
def test_a_signal_ends_processes_whose_reward_hangs(train, alone, tmp_path, reward, expected, reason):
    def impatient(processes):
        ending._PATIENCE = 0.1

    results = train(2, tmp_path / "run", reward=reward, checkpoint_every=10, before=impatient)
    assert codes(results) == expected, results[0]["err"]
    (line,) = told(results)
    assert line.startswith(f"error: {reason}reward='reward' has not answered for ")
    assert "a checkpoint keeps iteration 1, go on with: " in line
    assert_kept(tmp_path / "run", alone(agent="ddpo_is"))


@pytest.mark.parametrize("reward, killed", [("Killed", 1), ("KilledMain", 0)])
def test_a_process_that_is_killed_ends_the_other(train, alone, tmp_path, reward, killed):
    results = train(2, tmp_path / "run", reward=reward, checkpoint_every=1, killed=[killed])
    assert results[1 - killed]["code"] == 2
    (line,) = told(results)
    assert line.startswith("error: another process of the training is gone: it was killed, or ended by an error of its")
    assert "a checkpoint keeps iteration 1, go on with: diffusion-gym train --resume --out" in line
    assert_kept(tmp_path / "run", alone(agent="ddpo_is"))


def test_the_main_process_saves_what_one_that_is_killed_does_not_have_for_itself(train, alone, tmp_path):
    results = train(2, tmp_path / "run", reward="Killed", checkpoint_every=10, killed=[1])
    assert "a checkpoint keeps iteration 1" in told(results)[0]
    assert_kept(tmp_path / "run", alone(agent="ddpo_is"))


@pytest.mark.parametrize("error, codes_of_both", [(SystemExit(3), [2, 3]), (ValueError("no update"), [2, 2])])
def test_one_process_that_ends_while_updating_ends_all(train, alone, tmp_path, error, codes_of_both):
    """The other one is in the midst of a sum."""

    def breaks(processes):
        calls, genuine = [], policy_gradient.PolicyGradientAgent.update

        def update(*given):
            calls.append(None)
            if processes.index == 1 and len(calls) == 2:
                raise error
            return genuine(*given)

        policy_gradient.PolicyGradientAgent.update = update

    results = train(2, tmp_path / "run", before=breaks)
    assert codes(results) == codes_of_both
    (line,) = told(results)
    reason = "another process of the training is gone" if isinstance(error, SystemExit) else "no update"
    assert line.startswith(f"error: {reason}") and "a checkpoint keeps iteration 1" in line
    assert_kept(tmp_path / "run", alone(agent="ddpo_is"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"agent.clip-range": -1}, "clip_range=-1.0 must be"),
        ({"agent.clip-rang": 1}, "error: --agent.clip-rang is no option of train"),
        ({"seed": "x"}, "seed"),
        ({"env.model": "/nowhere"}, "error: model='/nowhere'"),
        ({"env.reward": "Brokn"}, "error: reward='Brokn' is unknown"),
    ],
)
def test_a_mistake_in_all_processes_is_told_once(train, tmp_path, options, message):
    results = train(2, tmp_path / "run", **options)
    assert codes(results) == [2, 2]
    assert message in results[0]["err"] and results[1]["err"] == ""
    assert not (tmp_path / "run").exists()


def test_a_bug_while_sampling_in_one_process_ends_all(train, alone, tmp_path):
    """DPOK's checkpoint gathers the replay buffer: both processes must come to it."""

    def breaks(processes):
        calls, genuine = [], base.collect_many

        def sample(*given, **options):
            calls.append(None)
            if processes.index == 1 and len(calls) == 2:
                raise RuntimeError("CUDA error: an illegal memory access")
            return genuine(*given, **options)

        base.collect_many = sample

    results = train(2, tmp_path / "run", agent="dpok", before=breaks, checkpoint_every=10)
    assert codes(results) == [2, "RuntimeError: CUDA error: an illegal memory access"]
    assert "process 1 of 2 failed: RuntimeError: CUDA error: an illegal memory access" in results[0]["err"]
    assert_kept(tmp_path / "run", alone(agent="dpok"))


def test_an_iteration_without_a_usable_reward_ends_all(train, alone, tmp_path):
    results = train(2, tmp_path / "run", reward="Nothing", checkpoint_every=10)
    assert codes(results) == [2, 2]
    (line,) = told(results)
    assert line.startswith(f"error: all {SAMPLES} rewards of the iteration are NaN or infinite")
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
