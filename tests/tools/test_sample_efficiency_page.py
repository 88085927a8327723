"""docs/sample-efficiency.md agrees with its records, and its tables say what records made by hand say."""

import shutil
from dataclasses import replace

import pytest

from benchmark_folders import write_run
from diffusion_gym.agents.benchmark.suites import Suite, suite_file
from diffusion_gym.storage import read_json
from tools.pages import sample_efficiency as script

GAINS = {"fast": 0.4, "paper-style": 0.1, "sampled": 0.2, "groups": 0.5}


def test_fast_has_met_its_target():
    """A third of the reward queries and of the seconds, and on no task less success than the paper's way."""
    results = script.read()
    for task in results.suite.tasks:
        fast, paper = (
            {name: results.column(agent, task, name).mean() for name in ("reward_queries", "seconds", "success")}
            for agent in (script.FAST, script.PAPER)
        )
        assert fast["reward_queries"] <= paper["reward_queries"] / 3
        assert fast["seconds"] <= paper["seconds"] / 3
        assert fast["success"] >= paper["success"]


@pytest.fixture
def results(tmp_path):
    """Four variants, five seeds, two tasks; success rises from 0.4 by the variant's gain, 0.01 more with each seed."""
    shutil.copy(suite_file("shapes-fast"), tmp_path)
    for agent, gain in GAINS.items():
        for task in ("composition", "count"):
            for seed in range(5):
                success = [0.4, 0.4 + gain + 0.01 * seed]
                more = {"success": success, "kl": [0.0, 1000 * gain], "vendi": [5.0, 4.0]}
                more["held_out_success"] = [0.3, 0.3 + gain]
                write_run(tmp_path, agent, task, seed, success, samples=False, suite="shapes-fast", **more)
    return script.Results.read(tmp_path)


def test_the_ablation_is_ordered_and_paired(results):
    rows = [line.strip("| ").split(" | ") for line in script.blocks(results)["ablation"].splitlines()[2:]]
    assert [row[0] for row in rows] == ["`groups`", "`fast`", "`sampled`"]
    groups, fast, sampled = rows
    assert groups[1] == "`group_size = 16`, `normalization = group`" and sampled[1] == "`renoise = false`"
    assert groups[4] == "+0.10 (+0.10 to +0.10)" and sampled[4] == "-0.20 (-0.20 to -0.20)"
    assert groups[5] == sampled[5] == "0.0039"  # all ten signs agree, 2 / 2^10, for two comparisons
    assert fast[4].strip() == fast[5].strip() == ""


def test_the_kept_records_are_of_the_suite_as_it_is():
    suite = Suite.load(script.SUITE)
    assert (script.KEPT / "shapes-fast.toml").read_text() == suite_file(script.SUITE).read_text()
    paths = sorted((script.KEPT / "records").glob("*.json"))
    for path in paths:
        script.check_variant(suite, path.name, read_json(path))
    record = read_json(paths[0])
    changed = replace(suite, agents={**suite.agents, record["agent"]: {"agent": "ddpo_is", "batch_size": 7}})
    with pytest.raises(ValueError, match="has batch_size=16, the suite 7; run it again"):
        script.check_variant(changed, paths[0].name, record)


def test_a_folder_without_records_is_refused_before_anything_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "KEPT", tmp_path / "kept")
    (tmp_path / "kept" / "records").mkdir(parents=True)
    (tmp_path / "kept" / "records" / "x.json").touch()
    with pytest.raises(ValueError, match="holds no records; pass the --out of"):
        script.take_over([tmp_path / "nothing"])
    assert (tmp_path / "kept" / "records" / "x.json").exists()
