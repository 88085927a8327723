"""The comparison of the libraries: its statistics and page on made-up records, its bookkeeping, and small real runs."""

import json
import re
from pathlib import Path

import libraries
import library_page as page
import numpy as np
import pytest
from library_training import TRAININGS, Training, measure
from scipy import stats

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "docs" / "results" / "libraries"


def make_record(library, seed, after, **changed):
    training = vars(Training(library, seed, total_reward_queries=640))
    return {
        **training,
        "settings": {"clip_range": 0.01},
        "versions": {"torch": "2"},
        "seconds": 100.0 + seed,
        "cpu_seconds": 90.0,
        "start_mb": 400,
        "peak_mb": 1000 + 10 * seed,
        "curve": [0.1, 0.2, 0.3, 0.4, after],
        "evaluation": {"reward_mean": after, "base_reward_mean": 0.35, "kl_to_base": 5.0},
        **changed,
    }


@pytest.fixture
def records(tmp_path):
    """`records(library=rewards)`: a folder with a record of each seed."""

    def make(**rewards):
        for library, values in rewards.items():
            for seed, after in enumerate(values):
                path = tmp_path / f"{library}-seed-{seed}.json"
                path.write_text(json.dumps(make_record(library, seed, after)))
        return tmp_path

    return make


def test_difference_is_welchs(records):
    groups = page.read_groups(records(native=[0.8, 0.9, 0.7], sb3_ppo=[0.5, 0.9, 0.85, 0.6]))
    mean, low, high = page.difference(groups["sb3_ppo"], groups["native"], page.after)
    one, other = np.array([0.5, 0.9, 0.85, 0.6]), np.array([0.8, 0.9, 0.7])
    parts = [values.var(ddof=1) / len(values) for values in (one, other)]
    freedom = sum(parts) ** 2 / sum(p**2 / (len(v) - 1) for p, v in zip(parts, (one, other), strict=True))
    half = stats.t.ppf(0.975, freedom) * sum(parts) ** 0.5  # Welch and Satterthwaite, by hand
    np.testing.assert_allclose([mean, low, high], one.mean() - other.mean() + np.array([0, -half, half]), rtol=1e-9)
    assert np.isnan(page.difference(groups["sb3_ppo"][:1], groups["native"], page.after)[1])


def test_the_verdict_follows_from_the_interval(records):
    same = page.findings(page.read_groups(records(native=[0.8, 0.9, 0.7], sb3_ppo=[0.75, 0.9, 0.8])))[0]
    assert "**within the seeds' noise**" in same and "differences of up to 0." in same
    apart = page.findings(page.read_groups(records(tianshou_ppo=[0.1, 0.11, 0.12])))[1]
    assert apart.startswith("Tianshou, its PPO − native: −0.69") and "**outside of the seeds' noise**" in apart


def test_a_single_seed_says_so(records):
    (told,) = page.findings(page.read_groups(records(native=[0.8], sb3_ppo=[0.7])))
    assert told == "SB3, its own PPO − native: −0.10; one seed does not show the noise."


def test_the_table(records):
    lines = page.table(page.read_groups(records(native=[0.8, 0.9, 0.7], sb3_ddpoppo=[0.6]))).splitlines()
    half = stats.t.ppf(0.975, 2) * 0.1 / 3**0.5
    expected = f"| native DDPO_IS | 3 | 0.35 → 0.80 ({0.8 - half:.2f} to {0.8 + half:.2f}) |"
    assert lines[2].startswith(expected) and "| 101 (99 to 103) | 90 (90 to 90) | 1,010 (985 to 1,035) |" in lines[2]
    assert lines[3].startswith("| SB3, `DDPOPPO` | 1 | 0.35 → 0.60 | 0.60 | 5 | 100 |")


def test_intervals_end_where_values_can(records, tmp_path):
    """A share of successes is at most 1; other rewards have no such end."""
    for bound, extra in ((r"0.90 \(0.00 to 1.00\)", True), (r"0.90 \(-0.37 to 2.17\)", False)):
        records(native=[0.8, 1.0])
        for seed, value in enumerate((0.8, 1.0)):
            path = tmp_path / f"native-seed-{seed}.json"
            record = json.loads(path.read_text())
            record["evaluation"] |= {"success": value} if extra else {}
            path.write_text(json.dumps(record))
        assert re.search(bound, page.headline(page.read_groups(tmp_path)))


def test_records_that_cannot_be_compared(records, tmp_path):
    with pytest.raises(ValueError, match="holds no record of native; make them with"):
        page.read_groups(records(sb3_ppo=[0.5]))
    records(native=[0.5])
    other = make_record("sb3_ppo", 0, 0.5, settings={"clip_range": 0.2})
    (tmp_path / "sb3_ppo-seed-0.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="cannot be compared: their settings differ"):
        page.read_groups(tmp_path)
    later = make_record("sb3_ppo", 0, 0.5, settings={"clip_range": 0.01, "env_options": {"eta": 1.0, "new": None}})
    (tmp_path / "sb3_ppo-seed-0.json").write_text(json.dumps(later))
    before = make_record("native", 0, 0.5, settings={"clip_range": 0.01, "env_options": {"eta": 1.0}})
    (tmp_path / "native-seed-0.json").write_text(json.dumps(before))
    assert list(page.read_groups(tmp_path)) == ["native", "sb3_ppo"]  # an option that came later, and was not given
    (tmp_path / "page.md").write_text("nothing")
    with pytest.raises(ValueError, match="has no place for .libraries."):
        page.write_pages(records(native=[0.5], sb3_ppo=[0.5]), *2 * [tmp_path / "page.md"])


@pytest.mark.parametrize("name, part", [("docs/libraries.md", page.results), ("README.md", page.headline)])
def test_the_pages_agree_with_the_stored_records(name, part):
    block = re.search(r"<!-- libraries -->\n(.*?)\n<!-- /libraries -->", (ROOT / name).read_text(), flags=re.S)
    assert block and block[1] == part(page.read_groups(RECORDS))


def test_runs_are_skipped_recorded_and_told(tmp_path, monkeypatch, capsys):
    """A finished run is left out, one that fails is told and stops nothing; a record of other settings is made anew."""
    started = []

    def child(command, **_):
        given = dict(zip(command[2::2], command[3::2], strict=True))
        started.append((given["--library"], given["--seed"]))
        if given["--library"] == "sb3_ppo":
            _["stdout"].write(b"Traceback\nValueError: it broke\n")
            return type("Done", (), {"returncode": 1})
        record = make_record(given["--library"], int(given["--seed"]), 0.5)
        Path(given["--out"]).write_text(json.dumps(record))
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(libraries.subprocess, "run", child)
    options = libraries.RunOptions(
        libraries="native,sb3_ppo", seeds="0,1", total_reward_queries=640, records=tmp_path, logs=tmp_path / "logs"
    )
    (tmp_path / "native-seed-0.json").write_text(json.dumps(make_record("native", 0, 0.5)))
    stale = make_record("native", 1, 0.5, preset="shapes")
    (tmp_path / "native-seed-1.json").write_text(json.dumps(stale))
    with pytest.raises(SystemExit, match="2 of 4 runs failed; logs in"):
        libraries.run(options)
    assert sorted(started) == [("native", "1"), ("sb3_ppo", "0"), ("sb3_ppo", "1")]
    shown = capsys.readouterr().out
    assert "native-seed-0: was finished" in shown and "native-seed-1: reward 0.350 -> 0.500, 101 s, 1010 MB" in shown
    failures = json.loads((tmp_path / "logs" / "failures.json").read_text())
    assert failures["sb3_ppo-seed-0"] == "exit code 1: ValueError: it broke"


def test_options_that_cannot_be():
    with pytest.raises(ValueError, match="library=.sb3_pop. is unknown; did you mean .sb3_ppo"):
        libraries.RunOptions(libraries="sb3_pop").trainings()
    with pytest.raises(ValueError, match="total_reward_queries=100 must be a multiple of samples_per_iteration=128"):
        libraries.RunOptions(total_reward_queries=100).trainings()


@pytest.mark.slow
@pytest.mark.parametrize("library", TRAININGS)
def test_every_library_trains(library):
    pytest.importorskip("stable_baselines3")
    pytest.importorskip("tianshou")
    record = measure(Training(library, total_reward_queries=256, evaluation_samples=64))
    assert len(record["curve"]) == 2 and record["evaluation"]["samples"] == 64
    assert record["evaluation"]["kl_to_base"] > 10  # it has moved
    assert record["peak_mb"] >= record["start_mb"] > 100 and record["seconds"] > 0
