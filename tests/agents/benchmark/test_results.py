"""Scores, comparisons and the summary, on hand-made records."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from benchmark_suites import write_record
from diffusion_gym.agents.benchmark.records import FORMAT
from diffusion_gym.agents.benchmark.results import Results, Verdict
from diffusion_gym.agents.benchmark.statistics import Estimate, holm, paired_difference, sign_flip_p
from diffusion_gym.agents.benchmark.suites import Suite, Task
from diffusion_gym.agents.benchmark.summary import summary_json, summary_text, write_summary
from diffusion_gym.storage import read_json, write_json

TASKS = {"easy": Task("X-v0", ceiling=1.0), "hard": Task("Y-v0", ceiling=-10.0)}
BASES = {"easy": [0.2, 0.4, 0.3], "hard": [-30.0, -32.0, -34.0]}


@pytest.fixture
def results(tmp_path):
    """`results(agent=(after on easy, after on hard), ...)`: rewards by seed; None is a run that is not there."""

    def make(**agents):
        for agent, rewards in agents.items():
            for (task, bases), values in zip(BASES.items(), rewards, strict=True):
                for seed, value in enumerate(values):
                    if value is not None:
                        write_record(tmp_path, agent, task, seed, bases[seed % 3], value, kl=2.0 * seed, vendi=None)
        return Results.read(tmp_path, replace(Suite.load("smoke"), name="tiny", tasks=TASKS))

    return make


def test_scores(results):
    found = results(a=([0.3, 1.0, 0.65], [-32.0, -10.0, -21.0]))
    easy, hard = found.scores("a")
    np.testing.assert_allclose(easy, [0.0, 1.0, 0.5], atol=1e-12)  # the base is 0.3, the mean of its seeds
    np.testing.assert_allclose(hard, [0.0, 1.0, 0.5], atol=1e-12)
    np.testing.assert_allclose(found.scores("a", 0)[0], [-1 / 7, 1 / 7, 0], atol=1e-12)
    assert found.column("a", "hard", "kl").tolist() == [0.0, 2.0, 4.0]
    assert np.isnan(found.column("a", "hard", "vendi")).all() and np.isnan(found.column("a", "hard", "none")).all()


def test_a_task_may_be_judged_on_held_out_prompts(results):
    found = results(a=([0.3, 1.0, 0.65], [-32.0, -10.0, -21.0]))
    for seed, value in enumerate((0.4, 0.8, 0.6)):
        points = found.records["a", "easy", seed]["points"]
        points[0]["held_out_reward"], points[-1]["held_out_reward"] = 0.2, value
    tasks = {**TASKS, "easy": replace(TASKS["easy"], judged_on="held_out_reward")}
    judged = replace(found, suite=replace(found.suite, tasks=tasks))
    np.testing.assert_allclose(judged.scores("a")[0], [0.25, 0.75, 0.5], atol=1e-12)
    np.testing.assert_allclose(judged.scores("a")[1], found.scores("a")[1])


def test_a_seed_that_some_agents_lack_does_not_move_the_scale(results):
    found = results(a=([0.5, 0.5, 0.5], [-20.0] * 3), b=([0.5, None, 0.5], [-20.0, None, None]))
    assert found.base("easy") == pytest.approx(0.3) and found.base("hard") == pytest.approx(-32)
    assert found.seeds("b", "easy") == [0, 2] and found.seeds("b", "hard") == [0]
    ours, theirs = found.paired("a", "b")
    assert [len(part) for part in ours] == [len(part) for part in theirs] == [2, 1]


def test_comparison_is_by_seed(results):
    found = results(a=([0.5, 0.9, 0.7], [-20.0] * 3), b=([0.4, 0.8, 0.6], [-22.0] * 3))
    difference, probability = found.compared("a", "b")
    assert difference.value == pytest.approx((0.1 / 0.7 + 2 / 22) / 2) and difference.above(0)
    ours, theirs = found.scores("a"), found.scores("b")
    shares = [stats.mannwhitneyu(x, y).statistic / 9 for x, y in zip(ours, theirs, strict=True)]
    assert probability.value == pytest.approx(np.mean(shares))
    assert found.compared("b", "a")[0].below(0) and found.agents == ["a", "b"]


def test_the_sign_flip_test_is_exact():
    """Of 2^5 sign patterns only two are as far from 0 as five differences that agree."""
    assert sign_flip_p([np.array([0.1, 0.2, 0.3]), np.array([0.2, 0.4])]) == pytest.approx(2 / 2**5)
    values = np.random.default_rng(0).normal(0.3, 1, 9)
    signs = 1 - 2 * ((np.arange(2**9)[:, None] >> np.arange(9)) & 1)
    means = (signs * values).mean(1)
    by_hand = 2 * min(np.mean(means >= values.mean() - 1e-12), np.mean(means <= values.mean() + 1e-12))
    assert sign_flip_p([values]) == pytest.approx(by_hand)
    assert sign_flip_p([np.zeros(4)]) == 1 == sign_flip_p([np.array([0.3])])


def test_holm():
    """The example of Holm's procedure: 0.01 x 4, 0.02 x 3, 0.03 x 2 (not below what came before), 0.5."""
    assert holm([0.02, 0.5, 0.01, 0.03]) == pytest.approx([0.06, 0.5, 0.04, 0.06])
    assert holm([0.4, 0.9]) == pytest.approx([0.8, 0.9]) and holm([]) == []


@pytest.mark.parametrize(
    ("low", "high", "p", "word"),
    [
        (0.1, 0.3, 0.01, "better"),
        (-0.3, -0.1, 0.05, "worse"),
        (-0.1, 0.3, 0.01, "undecided"),  # the interval does not say so
        (0.1, 0.3, 0.0625, "undecided"),  # too few seeds, or too many comparisons
        (float("nan"), float("nan"), 0.01, "undecided"),
    ],
)
def test_better_only_where_the_interval_says_so(low, high, p, word):
    assert Verdict("a", "b", Estimate(0.2, low, high), Estimate(0.5, 0.4, 0.6), p, 10).word == word


def test_verdicts(results):
    """Four seeds on two tasks tell a clear difference; b and c are alike."""
    noise = np.array([0.0, 0.02, -0.02, 0.01])
    clear, alike = 0.8 + noise, 0.5 + noise
    found = results(
        a=(clear, -12 + noise), b=(alike, -20 + noise), c=(alike[[1, 0, 3, 2]], (-20 + noise)[[1, 0, 3, 2]])
    )
    by_pair = {(verdict.first, verdict.second): verdict for verdict in found.verdicts()}
    assert len(by_pair) == 3
    first = by_pair["a", "b"]
    ours, theirs = found.paired("a", "b")
    assert first.word == "better" and first.pairs == 8 and first.difference == paired_difference(ours, theirs)
    assert first.p == pytest.approx(3 * 2 / 2**8)  # all eight agree; Holm's factor is 3
    assert next(verdict.word for pair, verdict in by_pair.items() if "a" not in pair) == "undecided"


def test_at_equal_network_evaluations(results, tmp_path):
    """The dear agent is cut where the cheap one ended, halfway to its last point; what it had there is a mean."""
    found = results(cheap=([0.5] * 3, [-20.0] * 3), dear=([0.8] * 3, [-12.0] * 3))
    for path in (tmp_path / "records").iterdir():
        record = read_json(path)
        record["points"][1]["network_evaluations"] = 100 if record["agent"] == "cheap" else 200
        write_json(path, record)
    found = Results.read(tmp_path, found.suite)
    equal = found.at_equal("network_evaluations")
    np.testing.assert_allclose(equal.scores("cheap"), found.scores("cheap"))
    np.testing.assert_allclose(equal.column("dear", "easy", "reward"), (np.array(BASES["easy"]) + 0.8) / 2)
    assert np.isnan(equal.column("dear", "hard", "kl")).all()  # of one of the two points alone
    assert {row["points"][-1]["network_evaluations"] for row in equal.records.values()} == {100}
    assert found.agents[0] == "dear" and equal.base("easy") == found.base("easy")
    for path in (tmp_path / "records").glob("*dear*0*"):
        record = read_json(path)
        record["points"][1]["network_evaluations"] = None
        write_json(path, record)
    with pytest.raises(
        ValueError, match="at_equal='network_evaluations': the record of dear on easy, seed 0, does not"
    ):
        Results.read(tmp_path, found.suite).at_equal("network_evaluations")


def test_three_seeds_on_one_task_decide_nothing(tmp_path):
    for agent, value in (("a", 0.9), ("b", 0.4)):
        for seed in range(3):
            write_record(tmp_path, agent, "easy", seed, 0.3, value + seed / 100)
    found = Results.read(tmp_path, replace(Suite.load("smoke"), tasks=TASKS))
    (verdict,) = found.verdicts()
    assert verdict.difference.above(0) and verdict.p == 2 / 2**3 and verdict.word == "undecided"


def test_the_summary(results, tmp_path):
    about = {"format": FORMAT, "task": "easy", "agent": "b", "seed": 3, "threads": 1}
    write_json(tmp_path / "records" / "z.json", {**about, "error": "OSError: no disk"})
    found = results(a=([0.5, 0.9, 0.7], [-20.0] * 3), b=([0.4, 0.8, 0.6], [-22.0] * 3))
    write_summary(found)
    text = (tmp_path / "summary.json").read_text()
    stored = json.loads(text, parse_constant=pytest.fail)  # no NaN, which JSON has not
    assert stored == summary_json(found) and stored["failures"][0]["error"] == "OSError: no disk"
    task = stored["agents"]["a"]["tasks"]["easy"]
    assert task["after"]["reward"] == pytest.approx({"mean": 0.7, "standard_error": 0.2 / 3**0.5})
    assert task["before"]["reward"]["mean"] == pytest.approx(0.3)
    assert task["after"]["vendi"] == {"mean": None, "standard_error": None}
    assert stored["agents"]["b"]["failed"] == 1 and stored["agents"]["a"]["runs"] == 6
    (pair,) = stored["comparisons"]
    assert (pair["first"], pair["second"], pair["pairs"], pair["verdict"]) == ("a", "b", 6, found.verdicts()[0].word)
    told = summary_text(found)
    assert f"a {pair['verdict']}" in told and f"{stored['agents']['a']['score']['value']:.3f}" in told
    with (tmp_path / "points.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24 and [row["reward"] for row in rows if row["agent"] == "a"][1] == "0.5"


def test_one_seed_and_no_success(results, tmp_path):
    found = results(a=([0.5], [-20.0]), b=([0.4], [-22.0]))
    assert "one seed: none" in summary_text(found) and found.verdicts()[0].word == "undecided"
    for path in (tmp_path / "records").iterdir():
        failed = {key: value for key, value in read_json(path).items() if key not in ("points", "peak_memory_mb")}
        write_json(path, {**failed, "error": "it broke"})
    none = Results.read(tmp_path, found.suite)
    assert none.agents == [] and len(none.failures) == 4 and summary_json(none)["agents"] == {}
    assert summary_text(none)


def test_a_folder_without_a_benchmark(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no benchmark; pass the --out of `diffusion-gym bench`"):
        Results.read(tmp_path)
    write_record(tmp_path, "a", "easy", 0, 0.1, 0.2)
    with pytest.raises(ValueError, match="has a record of another suite: task='easy' is unknown"):
        Results.read(tmp_path, Suite.load("smoke"))
    with pytest.raises(FileNotFoundError, match="must hold one .toml file, its suite"):
        Results.read(tmp_path)
