"""The tables of the reference results say what the records say."""

import shutil

import numpy as np
import pytest

from benchmark_folders import write_run, write_suite
from diffusion_gym.agents.benchmark.cells import Cell
from diffusion_gym.agents.benchmark.command import keep_suite
from tools.pages import benchmark as script


@pytest.fixture
def results(tmp_path):
    """Two agents, two seeds; `color` has strict success, `size` has not."""
    write_suite(tmp_path)
    for agent, gain in (("ddpo_is", 0.4), ("rwr", 0.1)):
        for seed in range(2):
            for task, base in (("color", 0.5), ("size", -1.0)):
                rewards = [base, base + gain + 0.1 * seed]
                more = {"kl": [0.0, 1000.0 + 100 * seed], "vendi": [5.0, 4.0 - seed]}
                if task == "color":
                    more |= {"success": rewards, "held_out_success": [0.5, 0.5 - gain]}
                write_run(tmp_path, agent, task, seed, rewards, samples=False, **more)
    return script.Results.read(tmp_path)


def test_scores_are_means_and_standard_errors_over_seeds(results):
    lines = script.blocks(results)["scores"].splitlines()
    assert lines[0] == "| agent | score | color | size |"
    assert lines[2] == "| pretrained | 0 | 0.50 ± 0.00 | -1.00 ± 0.00 |"
    error = np.std([0.9, 1.0], ddof=1) / np.sqrt(2)
    assert lines[3].startswith("| `ddpo_is` | ") and f"| 0.95 ± {error:.2f} | -0.55 ± {error:.2f} |" in lines[3]
    # The middle half of 0.8 and 1 of color, ceiling 1, and 0.4 and 0.5 of size, ceiling 0.
    assert f"| {(0.5 + 0.8) / 2:.2f} (" in lines[3]
    assert lines[4].startswith("| `rwr` | ")
    assert lines[-1] == "2 seeds a task, 32 reward queries a run, 8 runs."


def test_costs_are_means_over_runs(results):
    parts = script.blocks(results)
    lines = parts["costs"].splitlines()
    assert parts["hours"].startswith("A run took 6.0 minutes in the median, all 8 together 0.8 hours, ")
    assert lines[2] == "| `ddpo_is` | +0.45 | -0.40 | 1,050 | 5.0 → 3.5 | 640 | 0.7 |"


def test_agents_are_compared_at_equal_queries_and_at_equal_evaluations(tmp_path):
    """At half of the dear agent's evaluations it is where the cheap one ends: a gain of 0.2, of 0.5 to the ceiling."""
    write_suite(tmp_path)
    for agent, gain, evaluations in (("ddpo_is", 0.4, 1280), ("nft", 0.2, 640)):
        for seed in range(8):
            for task, base in (("color", 0.5), ("size", -1.0)):
                rewards = [base, base + gain + 0.001 * seed]
                costs = {"network_evaluations": [0, evaluations]}
                write_run(tmp_path, agent, task, seed, rewards, samples=False, **costs)
    rows = [
        line.strip("| ").split(" | ") for line in script.blocks(script.Results.read(tmp_path))["equal"].splitlines()
    ]
    dear, cheap = rows[2:]
    assert dear[0] == "`ddpo_is`" and dear[2] == "`nft`" and dear[4] == "–"
    assert cheap[0] == "`nft`" and cheap[2] == "–" and cheap[1] == cheap[3]
    assert float(dear[1].split()[0]) > 1.9 * float(dear[3].split()[0])


@pytest.mark.parametrize("name", [name for name in script.SUITES if name != "libraries"])  # a script's of before
def test_a_benchmark_goes_on_with_a_copy_of_the_kept_records(tmp_path, name):
    """The suite is the one that they were measured by, and so are the settings of every run."""
    shutil.copytree(script.KEPT / name, tmp_path / name)
    keep_suite(name, tmp_path / name)
    results = script.Results.read(tmp_path / name)
    cells = [Cell(name, task, agent, seed, str(tmp_path / name)) for agent, task, seed in results.records]
    assert cells and all(cell.finished() for cell in cells)


def test_the_cost_of_the_baseline_s_reward(tmp_path):
    """`nft` gains twice as much at twice the cost, and has a seed more; `rwr` never as much, and has one task."""
    write_suite(tmp_path)
    runs = {
        "ddpo_is": ([0.5, 0.6, 0.7], [-1.0, -1.1, -1.2], 100.0),
        "nft": ([0.5, 0.9, 0.9], [-1.0, -0.9, -0.8], 200.0),
        "rwr": ([0.5, 0.5, 0.6], None, 50.0),
    }
    for agent, (color, size, seconds) in runs.items():
        for task, rewards in (("color", color), ("size", size)):
            for seed in range(3 if agent == "nft" else 2) if rewards else ():
                shifted = [reward + (-0.05, 0.05, 0.3)[seed] for reward in rewards]  # in the mean of two it is as above
                costs = {"cpu_seconds": [0.0, seconds / 2, seconds]}
                write_run(tmp_path, agent, task, seed, shifted, samples=False, **costs)
    lines = script.blocks(script.Results.read(tmp_path))["reached ddpo_is"].splitlines()
    assert lines[0] == "| agent | color | size | median |"
    # nft is at 0.7 after half of its first 100 seconds: half of the baseline's 100, which gains nothing on size.
    assert sorted(lines[2:]) == ["| `nft` | 0.50 | – | 0.50 |", "| `rwr` | not | – | not |"]
