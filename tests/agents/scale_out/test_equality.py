"""Several processes give what one gives, and go on with the runs of each other."""

import shutil

import pytest
import torch

from diffusion_gym.agents.algorithms import AGENTS
from diffusion_gym.agents.processes import Processes
from diffusion_gym.agents.rollout import Trajectories, collect_many
from diffusion_gym.wrappers.one_step import OneStepVectorEnv
from scale_out_runs import DROPPED, ITERATIONS, SAMPLES, Run, assert_same, codes, files


@pytest.mark.parametrize("one_step, group", [(False, 1), (False, 2), (True, 1)])
def test_the_processes_sample_what_one_would(make_env, make_policy, one_step, group):
    env = make_env(2, autoreset_mode="Disabled")
    policy = make_policy(env)
    env = OneStepVectorEnv(env) if one_step else env
    whole = collect_many(env, policy, 8, (7, 0), group_size=group)
    for count in (2, 4):
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


# One for each way of sharing an update out: with and without groups, a replay buffer, pictures alone, preferences in
# groups. Others are slow.
QUICK = ("ddpo_is", "ddpo_iskl", "dpok", "rwr", "dgpo")
EVERY_AGENT = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in sorted(AGENTS)]


@pytest.mark.parametrize("agent", EVERY_AGENT)
def test_two_processes_equal_one(paired, alone, agent):
    """Where rewards failed, they are not equally many in both processes."""
    results, folder = paired(agent)
    assert codes(results) == [0, 0]
    assert results[0]["agent"] == results[1]["agent"]  # bit for bit, statistics included
    one = Run(alone(agent=agent))
    assert [row["samples_dropped"] for row in one.rows] == DROPPED.get(agent, [2, 2, 0])
    assert_same(Run(folder), one)


def test_two_processes_equal_one_on_pictures_noised_anew(train, tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for count, folder in enumerate(folders, 1):
        assert codes(train(count, folder, "--agent.renoise", agent="ddpo_is")) == [0] * count
    assert_same(Run(folders[1]), Run(folders[0]))


def test_processes_without_a_share_in_a_minibatch(train, alone, tmp_path):
    """A batch of one trajectory is one process's; the others have nothing to back-propagate."""
    options = {"agent.batch-size": 1, "agent.max-grad-norm": 1e-2, "total-reward-queries": SAMPLES}
    assert codes(train(4, tmp_path / "run", **options)) == [0] * 4
    assert_same(Run(tmp_path / "run"), Run(alone(**options)))


def test_the_main_process_alone_writes_and_speaks(paired, alone):
    """Were another one to write into the run folder, it would fail."""
    (main_one, other), folder = paired("ddpo_is")
    assert (main_one["code"], other["code"]) == (0, 0), other["err"]
    assert files(folder) == files(alone(agent="ddpo_is"))
    assert [row["iteration"] for row in Run(folder).rows] == [1, 2, 3]
    assert "3 iterations, 24 reward queries" in main_one["out"]
    assert other["out"] == other["err"] == ""


# --- resuming --------------------------------------------------------------------------------------------------------


def test_a_run_that_ended_goes_on_with_another_number_of_processes(train, alone, tmp_path):
    assert codes(train(2, tmp_path / "run", total_reward_queries=2 * SAMPLES)) == [0, 0]
    resumed = train(1, tmp_path / "run", "--total-reward-queries", str(SAMPLES * ITERATIONS), resume=True)
    assert codes(resumed) == [0]
    assert_same(Run(tmp_path / "run"), Run(alone(agent="ddpo_is")))


@pytest.mark.parametrize("first, second", [(2, 2), pytest.param(2, 1, marks=pytest.mark.slow), (1, 4)])
def test_a_run_that_was_killed_goes_on_with_any_number_of_processes(train, alone, paired, tmp_path, first, second):
    """DPOK, whose replay buffer is shared out anew; killed in the last iteration, after its metrics were written."""
    whole, part = alone(agent="dpok") if first == 1 else paired("dpok")[1], tmp_path / "part"
    shutil.copytree(whole, part, ignore=shutil.ignore_patterns("iteration-000003.*", "model"))
    resumed = train(second, part, resume=True)
    assert codes(resumed) == [0] * second
    assert all(result["agent"] == resumed[0]["agent"] for result in resumed)
    assert_same(Run(part), Run(alone(agent="dpok")))
    if first == second:
        found, expected = Run(part), Run(whole)
        assert found.rows == expected.rows and found.state == expected.state
        assert all(torch.equal(found.tensors[name], value) for name, value in expected.tensors.items())
