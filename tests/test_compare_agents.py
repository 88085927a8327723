"""The comparison of the agents: its statistics, its page on made-up records, its bookkeeping, and a small real run."""

import json
import re
import sys
from dataclasses import fields
from pathlib import Path

import compare_agents
import learning_charts
import learning_numbers as numbers
import learning_page
import pytest
from scipy import stats

from diffusion_gym.agents.algorithms import AGENTS

DOCS = Path(__file__).resolve().parent.parent / "docs"

T_2 = 4.302653  # 97.5 % quantile of Student's t with 2 degrees of freedom, from a table


def make_record(agent, seed, before, after, kl=100.0, **changed):
    """A record whose two prompts have 64 samples each and change by 0.1 less and 0.1 more than their mean."""
    prompts = {
        name: {"samples": 64, "success": after + shift, "base_success": before, "reward": 0.0, "base_reward": 0.0}
        for name, shift in (("a", -0.1), ("b", 0.1))
    }
    ends = {"success": after, "base_success": before, "reward_mean": 2 * after, "base_reward_mean": 2 * before}
    return {
        "agent": agent,
        "seed": seed,
        "env": "DiffusionDenoise-Shapes-Location-v0",
        "preset": "shapes-demo",
        "total_reward_queries": 1000,
        "env_options": {},
        "evaluation_samples": 128,
        "agent_options": {},
        "samples_per_iteration": 50,
        "rollout_batch": 50,
        "threads": 1,
        "seconds": 90.0 + 30 * seed,
        "versions": {},
        "curve": {
            "reward_queries": [50 * (index + 1) for index in range(20)],
            "reward_mean": [0.1 * index + seed for index in range(20)],
            "success_mean": [before + (after - before) * index / 19 for index in range(20)],
        },
        "evaluation": {**ends, "samples": 128, "kl_to_base": kl, "prompts": prompts, "held_out": ends},
        **changed,
    }


def make_groups(**afters):
    """Three seeds of each agent, from their successes after training; before it, 0.35, 0.36 and 0.37."""
    return {
        agent: [make_record(agent, seed, 0.35 + 0.01 * seed, after) for seed, after in enumerate(values)]
        for agent, values in afters.items()
    }


def write_page(folder, groups, monkeypatch):
    """What `page` makes of records, through the command line."""
    for record in (record for own in groups.values() for record in own):
        path = folder / "records" / f"{record['agent']}-seed-{record['seed']}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(record))
    page = folder / "agents.md"
    page.write_text("before\n<!-- learning -->\nold\n<!-- /learning -->\nafter\n")
    options = ["--records", folder / "records", "--page", page, "--images", folder / "images"]
    monkeypatch.setattr(sys, "argv", ["compare_agents.py", "page", *map(str, options)])
    compare_agents.main()
    return page.read_text()


def row(text, agent):
    head, line = (
        next(line for line in text.splitlines() if line.startswith(f"| {name} |")) for name in ("agent", agent)
    )
    return dict(zip(*([cell.strip() for cell in part.split("|")[1:-1]] for part in (head, line)), strict=True))


GOOD = {
    "ddpo_is": (0.90, 0.94, 0.98),
    "ddpo_sf": (0.70, 0.71, 0.72),
    "rwr": (0.40, 0.50, 0.60),
}


def test_the_table_has_the_numbers_worked_by_hand(tmp_path, monkeypatch):
    text = write_page(tmp_path, make_groups(**GOOD), monkeypatch)
    best, worst = row(text, "DDPO_IS"), row(text, "RWR")
    # 0.94 +- 4.3027 * 0.04 / sqrt(3) = 0.84 to 1.04, which no share can be
    assert best["success before → after"] == "0.36 → 0.94 (0.84 to 1.00)"
    assert best["change, over seeds"] == "+0.58 (+0.51 to +0.65)"  # 0.55, 0.58, 0.61: +- 0.0745
    assert best["significant"] == "yes"
    # six pairs, 0.45, 0.65, 0.48, 0.68, 0.51, 0.71: s = 0.1124, 2.5706 * 0.1124 / sqrt(6) = 0.118
    assert best["change, over pairs"] == "+0.58 (+0.46 to +0.70)"
    # iterations that end at 450 and 500: 0.8 and 0.9 plus the seed, 1.85 +- 4.3027 / sqrt(3)
    assert best["training reward at 500 queries"] == "1.85 (−0.63 to 4.33)"
    assert best["training reward at 1,000 queries"] == "2.85 (0.37 to 5.33)"
    assert best["minutes"] == "2.0" and best["seeds"] == "3"
    assert worst["success before → after"] == "0.36 → 0.50 (0.25 to 0.75)"
    assert worst["change, over seeds"] == "+0.14 (−0.08 to +0.36)"  # 0.05, 0.14, 0.23: +- 0.2236
    assert worst["significant"] == "no"
    assert "higher for DDPO_SF, DDPO_IS; not significantly different for RWR." in text


def test_the_page_keeps_its_text_and_has_both_charts(tmp_path, monkeypatch):
    text = write_page(tmp_path, make_groups(**GOOD), monkeypatch)
    assert text.startswith("before\n<!-- learning -->\n![") and text.endswith("\n<!-- /learning -->\nafter\n")
    assert "old" not in text and str(tmp_path) not in text
    for name in ("learning-curves.png", "reward-vs-kl.png"):
        assert f"(images/{name})" in text
        assert (tmp_path / "images" / name).read_bytes().startswith(b"\x89PNG")
    assert "--agents ddpo_sf,ddpo_is,rwr --seeds 0,1,2 --total-reward-queries 1000" in text


def test_the_paper_s_order_is_told_from_the_numbers(tmp_path, monkeypatch):
    text = write_page(tmp_path, make_groups(**GOOD), monkeypatch)
    assert "Order by mean success after training: DDPO_IS 0.94, DDPO_SF 0.71, RWR 0.50." in text
    assert "DDPO_IS ≥ DDPO_SF > RWR, shows in the means" in text
    assert "DDPO_IS − DDPO_SF = +0.23 (+0.16 to +0.30), significant" in text  # 0.20, 0.23, 0.26
    assert "DDPO_SF − RWR = +0.21 (−0.01 to +0.43), not significant" in text  # 0.30, 0.21, 0.12


@pytest.mark.parametrize("swapped", [("ddpo_is", "ddpo_sf"), ("ddpo_sf", "rwr")])
def test_the_paper_s_order_is_denied_when_it_does_not_show(tmp_path, monkeypatch, swapped):
    one, other = swapped
    text = write_page(tmp_path, make_groups(**{**GOOD, one: GOOD[other], other: GOOD[one]}), monkeypatch)
    assert "DDPO_IS ≥ DDPO_SF > RWR, does not show in the means" in text


def test_equality_is_enough_for_importance_sampling_but_not_against_regression(tmp_path, monkeypatch):
    equal = make_groups(**{**GOOD, "ddpo_is": GOOD["ddpo_sf"]})
    assert "> RWR, shows in the means" in write_page(tmp_path, equal, monkeypatch)
    equal = make_groups(**{**GOOD, "rwr": GOOD["ddpo_sf"]})
    assert "> RWR, does not show in the means" in write_page(tmp_path, equal, monkeypatch)


def test_a_missing_agent_and_a_single_seed_are_said(tmp_path, monkeypatch):
    groups = make_groups(ddpo_is=(0.9, 0.9, 0.9), dpok=(0.8,))
    text = write_page(tmp_path, groups, monkeypatch)
    assert "is open: no results of DDPO_SF, RWR." in text
    assert "higher for DDPO_IS; open, with one seed, for DPOK." in text
    assert row(text, "DPOK")["change, over seeds"] == "+0.45" and row(text, "DPOK")["significant"] == "one seed"


@pytest.mark.parametrize(("own", "word"), [((40, 50, 60), "nearer to"), ((140, 150, 160), "no nearer to")])
def test_divergence_is_compared_with_importance_sampling(tmp_path, monkeypatch, own, word):
    groups = make_groups(ddpo_is=(0.9, 0.9, 0.9), ddpo_iskl=(0.8, 0.9, 1.0))
    for record, kl in zip(groups["ddpo_iskl"], own, strict=True):
        record["evaluation"]["kl_to_base"] = kl
    text = write_page(tmp_path, groups, monkeypatch)
    mean = sum(own) / 3
    low, high = (f"{mean - 100 + side * T_2 * 10 / 3**0.5:+.1f}".replace("-", "−") for side in (-1, 1))
    assert f"DDPO_ISKL ends {word} the pretrained model than DDPO_IS" in text
    assert f"({low} to {high}), significant" in text
    assert "difference in success 0.00 (−0.25 to +0.25), not significant" in text


def test_a_reward_without_success_is_compared_by_itself(tmp_path, monkeypatch):
    groups = make_groups(**GOOD)
    del groups["rwr"][1]["evaluation"]["success"]
    text = write_page(tmp_path, groups, monkeypatch)
    assert row(text, "DDPO_SF")["reward before → after"] == "0.72 → 1.42 (1.37 to 1.47)"


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [("total_reward_queries", 2000, "rwr-seed-0"), ("agent_options", {"learning_rate": 1.0}, "rwr-seed-0")],
)
def test_records_that_cannot_be_compared_are_refused(tmp_path, monkeypatch, key, value, what):
    groups = make_groups(**GOOD)
    groups["rwr"][2][key] = value
    with pytest.raises(SystemExit, match=f"rwr-seed-2 cannot be compared: their {key} differ"):
        write_page(tmp_path, groups, monkeypatch)


def test_pairs_of_one_sample_give_the_paired_t_test():
    after, before = [1, 1, 1, 0, 1, 0, 1, 1], [0, 1, 0, 0, 0, 1, 0, 1]
    rows = [{"samples": 1, "success": one, "base_success": other} for one, other in zip(after, before, strict=True)]
    records = [{"evaluation": {"prompts": dict(enumerate(part))}} for part in (rows[:3], rows[3:])]
    found = numbers.over_pairs(records, "success")
    wanted = stats.ttest_rel(after, before).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))


def test_pairs_count_by_their_samples():
    rows = {"a": (16, 0.2), "b": (48, 0.6)}
    prompts = {name: {"samples": size, "success": change, "base_success": 0} for name, (size, change) in rows.items()}
    found = numbers.over_pairs([{"evaluation": {"prompts": prompts}}], "success")
    # 0.25 * 0.2 + 0.75 * 0.6; sqrt(2 * (0.25**2 * 0.3**2 + 0.75**2 * 0.1**2)) = 0.15, times t = 12.7062
    assert (found.mean, found.high - found.mean) == pytest.approx((0.5, 12.7062 * 0.15), rel=1e-4)


def test_training_reward_of_long_iterations_is_the_last_one_within_the_queries():
    curve = {"reward_queries": [400, 800, 1200], "reward_mean": [1.0, 2.0, 3.0]}
    record = {"total_reward_queries": 1000, "curve": curve}
    assert [numbers.training_reward(record, queries) for queries in (500, 1000)] == [1.0, 2.0]
    assert numbers.training_reward(record, 100) != numbers.training_reward(record, 100)  # NaN


def test_labels_keep_their_order_and_their_distance():
    assert learning_charts.spread([0.2, 0.8], 0.1) == pytest.approx([0.2, 0.8])
    assert learning_charts.spread([0.52, 0.5], 0.1) == pytest.approx([0.56, 0.46])
    assert learning_charts.spread([0.99, 1.0, 1.0], 0.1) == pytest.approx([0.8, 0.9, 1.0])


def test_the_page_names_options_and_files_that_exist():
    text = (DOCS / "agents.md").read_text()
    known = {entry.name for agent in AGENTS.names() for entry in fields(AGENTS[agent].Config)}
    named = {option.replace("-", "_").removeprefix("no_") for option in re.findall(r"--agent\.([a-z0-9-]+)", text)}
    assert len(named) > 30 and named <= known
    assert all(f"`{agent}`" in text for agent in AGENTS.names() if agent in numbers.LABELS)
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (DOCS / target).exists(), target


def test_the_page_agrees_with_the_stored_records():
    text = (DOCS / "agents.md").read_text()
    if not compare_agents.RECORDS.is_dir():
        assert "Not measured yet" in text
        return
    assert learning_page.results(numbers.read_groups(compare_agents.RECORDS), "images") in text


class FakeCommands:
    """Stands in for the processes: `train` and `eval` write what the real ones would."""

    def __init__(self):
        self.calls = []
        self.failing, self.stopping = set(), set()

    def __call__(self, arguments, threads, log):
        name = Path(arguments[arguments.index("--out") + 1] if arguments[0] == "train" else arguments[1]).name
        self.calls.append((arguments[0], name, "--resume" in arguments))
        if name in self.failing:
            raise RuntimeError("`train` ended with exit code 2: error: no")
        if arguments[0] == "eval":
            record = make_record("rwr", 0, 0.3, 0.6)
            (Path(arguments[1]) / "eval.json").write_text(json.dumps(record["evaluation"]))
            return
        with compare_agents.PARSING:
            settings = compare_agents.parse_train([argument for argument in arguments[1:] if argument != "--resume"])
        folder, done = settings.out, 64 if name in self.stopping else settings.total_reward_queries
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints" / "iteration-000001.safetensors").touch()
        config = {"settings": settings.to_json(), "versions": {"torch": "2.6"}}
        (folder / "config.json").write_text(json.dumps(config))
        metrics = {"iteration": 1, "reward_queries": done, "reward_mean": 0.5, "success_mean": 0.5, "seconds": 2.5}
        (folder / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")


@pytest.fixture
def commands(monkeypatch):
    fake = FakeCommands()
    monkeypatch.setattr(compare_agents, "_call", fake)
    return fake


def options(folder, **changed):
    chosen = {"agents": "ddpo_sf,rwr", "seeds": "0,1", "total_reward_queries": 128, **changed}
    return compare_agents.RunOptions(out=folder / "runs", records=folder / "records", **chosen)


def test_what_is_finished_is_left_out(tmp_path, commands, capsys):
    compare_agents.run(options(tmp_path))
    names = ["ddpo_sf-seed-0", "ddpo_sf-seed-1", "rwr-seed-0", "rwr-seed-1"]
    assert commands.calls == [(command, name, False) for name in names for command in ("train", "eval")]
    record = json.loads((tmp_path / "records" / "rwr-seed-1.json").read_text())
    assert (record["agent"], record["seed"], record["seconds"]) == ("rwr", 1, 2.5)
    assert record["curve"] == {"reward_queries": [128], "reward_mean": [0.5], "success_mean": [0.5]}
    assert record["agent_options"]["inverse_temperature"] and record["versions"] == {"torch": "2.6"}
    assert "prompts" not in record["evaluation"]["held_out"] and str(tmp_path) not in json.dumps(record)
    assert "rwr-seed-1: success 0.30 -> 0.60" in capsys.readouterr().out
    compare_agents.run(options(tmp_path))
    assert len(commands.calls) == 8
    compare_agents.run(options(tmp_path, samples=32, agents="rwr", seeds="0"))  # another evaluation
    assert commands.calls[8:] == [("train", "rwr-seed-0", True), ("eval", "rwr-seed-0", False)]


def test_an_unfinished_run_goes_on_and_a_failed_one_costs_no_other(tmp_path, commands):
    commands.failing, commands.stopping = {"ddpo_sf-seed-0"}, {"rwr-seed-0"}
    with pytest.raises(SystemExit, match="2 of 4 runs failed"):
        compare_agents.run(options(tmp_path, jobs=2))
    assert sorted(path.stem for path in (tmp_path / "records").iterdir()) == ["ddpo_sf-seed-1", "rwr-seed-1"]
    failures = json.loads((tmp_path / "runs" / "failures.json").read_text())
    assert failures["ddpo_sf-seed-0"] == "`train` ended with exit code 2: error: no"
    assert "stopped early" in failures["rwr-seed-0"]
    commands.failing, commands.stopping, commands.calls = set(), set(), []
    compare_agents.run(options(tmp_path))
    assert [call for call in commands.calls if call[0] == "train"] == [
        ("train", "ddpo_sf-seed-0", False),
        ("train", "rwr-seed-0", True),
    ]


def test_a_run_folder_with_other_settings_is_left_alone(tmp_path, commands):
    compare_agents.run(options(tmp_path, agents="rwr", seeds="0"))
    with pytest.raises(SystemExit):
        compare_agents.run(options(tmp_path, agents="rwr", seeds="0", total_reward_queries=256))
    assert len(commands.calls) == 2
    failure = json.loads((tmp_path / "runs" / "failures.json").read_text())["rwr-seed-0"]
    assert "holds a run with other total_reward_queries; remove it or choose another --out" in failure


def test_a_run_without_a_checkpoint_begins_again(tmp_path, commands):
    commands.stopping = {"rwr-seed-0"}
    with pytest.raises(SystemExit):
        compare_agents.run(options(tmp_path, agents="rwr", seeds="0"))
    (tmp_path / "runs" / "rwr-seed-0" / "checkpoints" / "iteration-000001.safetensors").unlink()
    commands.stopping = set()
    compare_agents.run(options(tmp_path, agents="rwr", seeds="0"))
    assert commands.calls[1] == ("train", "rwr-seed-0", False)


@pytest.mark.slow
def test_two_agents_train_and_the_page_follows(tmp_path, monkeypatch):
    chosen = options(tmp_path, agents="ddpo_sf,ddpo_is,no_such_agent", seeds="0", samples=16)
    with pytest.raises(SystemExit, match="1 of 3 runs failed"):
        compare_agents.run(chosen)
    assert "no_such_agent" in json.loads((tmp_path / "runs" / "failures.json").read_text())["no_such_agent-seed-0"]
    record = json.loads((tmp_path / "records" / "ddpo_is-seed-0.json").read_text())
    assert record["curve"]["reward_queries"][-1] >= 128 and record["evaluation"]["samples"] == 16
    assert record["evaluation"]["seed"] == 1000 and record["seconds"] > 0
    assert "/" not in json.dumps(record["versions"]) and str(tmp_path) not in json.dumps(record)
    (tmp_path / "records" / "ddpo_is-seed-0.json").unlink()
    compare_agents.run(options(tmp_path, agents="ddpo_is", seeds="0", samples=16))  # resumes, evaluates again
    again = json.loads((tmp_path / "records" / "ddpo_is-seed-0.json").read_text())
    assert again == record
    assert row(write_page(tmp_path, {}, monkeypatch), "DDPO_IS")["significant"] == "one seed"
