"""The page of a benchmark: numbers of its records, its figures as files, and nothing from elsewhere."""

import csv
import re
import shutil
from html import unescape

import numpy as np
import pytest
from scipy import stats

from benchmark_folders import PROMPTS, write_failure, write_run, write_suite
from diffusion_gym.agents.benchmark.results import Results
from diffusion_gym.agents.cli import main
from diffusion_gym.agents.report.benchmark.page import write_benchmark_report

GAINS = {"ddpo_is": 0.5, "rwr": 0.1}
SEEDS = 4


def reward(agent, task, seed):
    """The rewards of the three measurements of a run; the pretrained model's does not depend on the agent."""
    base = {"color": 0.3, "size": -1.0}[task] + 0.01 * seed
    return [base, base + GAINS[agent] / 2, base + GAINS[agent] + 0.02 * seed]


def fill(folder, agents=tuple(GAINS), seeds=SEEDS, samples=True):
    write_suite(folder)
    for agent in agents:
        for task in ("color", "size"):
            for seed in range(seeds):
                values = reward(agent, task, seed)
                measures = {"kl": [0.0, 50.0, 100.0 + seed], "vendi": [4.0, 3.5, 3.0 - 0.1 * seed]}
                measures |= {"held_out_reward": [values[0], values[1], values[2] - 0.05]}
                if task == "color":
                    measures |= {"success": values, "probe": [1.0, 1.1, 0.9]}
                write_run(folder, agent, task, seed, values, samples=samples and seed < 2, **measures)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A benchmark of two agents, two tasks and four seeds, with its page."""
    folder = fill(tmp_path_factory.mktemp("benchmark") / "made")
    write_failure(folder, "rwr", "color", 9)
    write_benchmark_report(folder)
    return folder


@pytest.fixture(scope="module")
def text(made):
    return (made / "report.html").read_text(encoding="utf-8")


def words(text):
    """What a reader sees, markup left out."""
    body = re.sub(r"<style>.*?</style>", " ", text, flags=re.S)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


def cells(text, section):
    """The rows of the tables in a section."""
    part = text.partition(f'<h2 id="{section}"')[2].partition("</section>")[0]
    rows = re.findall(r"<tr.*?</tr>", part, flags=re.S)
    return [[words(cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row, flags=re.S)] for row in rows]


def table_rows(folder, name):
    with (folder / "figures" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def headings(text):
    return re.findall(r'<h2 id="([a-z-]+)"', text)


def test_the_page_loads_nothing(text):
    assert "://" not in text and "@import" not in text and "url(" not in text and "<script" not in text
    sources = re.findall(r'src="([^"]*)"', text)
    assert sources and all(source.startswith("data:image/") for source in sources)
    links = set(re.findall(r'href="([^"]*)"', text))
    assert all(link.startswith(("#", "figures/", "data:")) for link in links)
    assert "<b>bold</b>" not in text and PROMPTS[2] in unescape(text)  # a prompt's markup is text


def test_contents_lead_to_every_section(text):
    marks = headings(text)
    expected = "scores pictures learning verdicts results trade-offs spread maps shares failures reproduce"
    assert marks == expected.split()
    assert re.findall(r'href="#([a-z-]+)"', text.partition("</nav>")[0].partition("<nav")[2]) == marks


def test_every_linked_file_is_there_and_every_file_is_linked(made, text):
    linked = {unescape(name) for name in re.findall(r'href="figures/([^"]*)"', text)}
    assert linked == {path.name for path in (made / "figures").iterdir()}
    for path in (made / "figures").iterdir():
        assert path.stat().st_size > 20
    drawn = {path.stem for path in (made / "figures").iterdir() if path.suffix == ".svg"}
    assert {"scores", "profiles", "reward-seconds--size", "frontier--color", "spread--size--rwr"} <= drawn
    assert drawn <= {path.stem for path in (made / "figures").iterdir() if path.suffix == ".csv"}


def test_baseline_and_tuned_are_means_and_standard_errors_over_seeds(made, text):
    for agent in GAINS:
        for task in ("color", "size"):
            first, _, last = np.array([reward(agent, task, seed) for seed in range(SEEDS)]).T
            row = next(row for row in table_rows(made, "results") if (row["task"], row["agent"]) == (task, agent))
            assert float(row["reward_baseline"]) == pytest.approx(first.mean())
            assert float(row["reward_tuned"]) == pytest.approx(last.mean())
            assert float(row["reward_tuned_standard_error"]) == pytest.approx(stats.sem(last))
            assert float(row["kl_tuned"]) == pytest.approx(101.5)
    rows = cells(text, "results")
    color = next(row for row in rows if row[0] == "ddpo_is")
    # Means 0.315 and 0.845, a gain of 0.530 of which held-out prompts lack 0.05; errors 0.0129 / 2 and 0.0387 / 2.
    assert color[1:6] == ["4", "+0.530", "+0.050", "0.315 ± 0.006", "0.845 ± 0.019"]
    assert "84.5 % ± 1.9" in [cell.replace("\xa0", " ") for cell in color]
    size = [row for row in rows if row[0] == "ddpo_is"][1]
    assert size[4:8] == ["−0.985 ± 0.006", "−0.455 ± 0.019", "–", "–"]  # it has no strict success


def test_scores_and_verdicts_are_those_of_the_results(made, text):
    results = Results.read(made)
    (verdict,) = results.verdicts()
    assert verdict.word == "better"
    pair = cells(text, "verdicts")[1]  # below the head
    expected = f"{verdict.difference.low:.3f} to {verdict.difference.high:.3f}"
    assert pair[0] == "ddpo_is better than rwr"
    assert "Benchmark made ddpo_is is better than rwr; 0 of 1 pairs are undecided." in words(text)  # before all else
    assert pair[1] == f"+{verdict.difference.value:.3f} {expected}"
    assert pair[3:] == [f"{verdict.p:.2g}", "8"]
    table = text.partition('id="verdicts"')[2].partition("</table>")[0]
    assert 'class="scroll' not in table  # it is read without a box that cuts it off
    scores = {row["agent"]: float(row["value"]) for row in table_rows(made, "scores")}
    for agent in GAINS:
        every = np.concatenate(results.scores(agent))
        assert scores[agent] == pytest.approx(stats.trim_mean(every, 0.25))
    assert ">rwr, 8 runs, 1 failed</text>" in text
    matrix = {(row["first"], row["second"]): float(row["probability"]) for row in table_rows(made, "improvement")}
    assert matrix == {("ddpo_is", "rwr"): 1.0, ("rwr", "ddpo_is"): 0.0}


def test_an_undecided_pair_is_not_called_better(tmp_path):
    write_suite(tmp_path)
    for agent, shift in (("ddpo_is", 0.01), ("rwr", -0.01)):
        for seed in range(5):
            write_run(tmp_path, agent, "color", seed, [0.3, 0.5 + shift * (-1) ** seed], samples=False)
    text = words(write_benchmark_report(tmp_path).read_text(encoding="utf-8"))
    assert "undecided against" in text and "No agent is shown to be better than another: the one pair is" in text
    assert "ddpo_is better than" not in text and "rwr better than" not in text


def test_curves_are_means_over_seeds_within_their_band(made):
    for cost, last in (("reward_queries", 64), ("network_evaluations", 1280), ("seconds", 20 * 1.15)):
        rows = table_rows(made, f"reward-{cost.replace('_', '-')}--color")
        found = [row for row in rows if row["agent"] == "ddpo_is"]
        assert float(found[-1][cost]) == pytest.approx(last)
        wanted = np.mean([reward("ddpo_is", "color", seed) for seed in range(SEEDS)], 0)
        assert [float(row["reward"]) for row in found] == pytest.approx(wanted.tolist())
        for row in found:
            assert float(row["low"]) < float(row["reward"]) < float(row["high"])


def test_performance_profiles_are_shares_of_runs(made):
    results = Results.read(made)
    for row in table_rows(made, "profiles"):
        parts = results.scores(row["agent"])
        share = np.mean([(part > float(row["score"])).mean() for part in parts])
        assert float(row["share"]) == pytest.approx(share)


def test_shares_of_success(made):
    rows = {row["model"]: row for row in table_rows(made, "success--color")}
    assert float(rows["pretrained model"]["success"]) == pytest.approx(0.315)
    assert float(rows["ddpo_is"]["success"]) == pytest.approx(0.845)
    assert float(rows["ddpo_is"]["no success"]) == pytest.approx(0.155)
    assert not (made / "figures" / "success--size.csv").exists()


def test_the_command_and_the_costs(text):
    found = words(text)
    assert "diffusion-gym bench --suite" in found and "made.toml \\ --agents ddpo_is,rwr \\ --seeds 10" in found
    assert "--budget" not in found  # the suite's
    assert "2 agents · 2 tasks · 4 seeds · 16 runs · 64 reward queries a run" in found
    assert "took 96.0 minutes" in found  # 16 of 6 minutes, and the failed one
    assert "python 3.11.7" in found and "torch 9.8.7" in found and "processor a processor" in found


def test_failed_runs_are_listed_with_what_went_wrong(text):
    part = words(text.partition('<h2 id="failures"')[2].partition("</section>")[0])
    assert "rwr, seed 9" in part and "RuntimeError: <no> luck" in part and "Traceback" in part
    assert "Failed: 1 of 17 runs" in words(text)


def test_records_alone_are_enough(made, tmp_path):
    for name in ("records", "made.toml"):
        copy = shutil.copytree if (made / name).is_dir() else shutil.copy
        copy(made / name, tmp_path / name)
    text = write_benchmark_report(tmp_path).read_text(encoding="utf-8")
    assert "The run folders are not here" in words(text)
    assert "<img" not in text
    assert "spread" not in headings(text) and "maps" not in headings(text) and "learning" in headings(text)
    assert cells(text, "results") == cells((made / "report.html").read_text(encoding="utf-8"), "results")


def test_a_task_that_is_judged_on_held_out_prompts(tmp_path):
    fill(tmp_path, samples=False)
    suite = next(tmp_path.glob("*.toml"))
    suite.write_text(suite.read_text().replace("[tasks.size]", '[tasks.size]\njudged_on = "held_out_reward"'))
    text = words(write_benchmark_report(tmp_path).read_text(encoding="utf-8"))
    assert "A run's score is 0 where its reward (of size: that of held-out prompts) is the pretrained model's" in text
    for name in ("reward-reward-queries", "reward-network-evaluations", "reward-seconds", "frontier"):
        assert "held_out_reward" in table_rows(tmp_path, f"{name}--size")[0]
        assert "held_out_reward" not in table_rows(tmp_path, f"{name}--color")[0]


def test_one_seed_of_one_agent(tmp_path):
    fill(tmp_path, ["rwr"], seeds=1, samples=False)
    text = words(write_benchmark_report(tmp_path).read_text(encoding="utf-8"))
    assert "One seed: there are no intervals" in text
    assert "1 agent · 2 tasks · 1 seed · 2 runs" in text
    assert "There are no two agents with a run in common to compare" in text
    assert "nan" not in text.lower().split()
    assert not (tmp_path / "figures" / "verdicts.csv").exists()


def test_an_unfinished_matrix_says_so(tmp_path):
    fill(tmp_path, seeds=2, samples=False)
    assert "missing" not in words(write_benchmark_report(tmp_path).read_text(encoding="utf-8"))
    next((tmp_path / "records").glob("size--rwr--seed-1*")).unlink()
    text = words(write_benchmark_report(tmp_path).read_text(encoding="utf-8"))
    assert "Runs that are still missing: 1. The agents' scores are not of the same tasks and seeds." in text


def test_no_run_succeeded(tmp_path):
    write_suite(tmp_path)
    write_failure(tmp_path, "rwr", "color", 0)
    text = write_benchmark_report(tmp_path).read_text(encoding="utf-8")
    assert headings(text) == ["failures", "reproduce"]
    assert "Failed: 1 of 1 runs" in words(text)


def test_a_record_without_a_measure_leaves_its_place_empty(tmp_path):
    write_suite(tmp_path)
    for seed, kl in enumerate((None, 7.0)):
        write_run(tmp_path, "rwr", "color", seed, [0.3, 0.4], samples=False, kl=[0.0, kl])
    write_run(tmp_path, "ddpo_is", "color", 0, [0.3, 0.4], samples=False)
    text = write_benchmark_report(tmp_path).read_text(encoding="utf-8")
    rows = {row[0]: row for row in cells(text, "results")}
    assert rows["ddpo_is"][-1] == "–"
    found = [row for row in table_rows(tmp_path, "frontier--color") if row["agent"] == "rwr"]
    assert [float(row["kl"]) for row in found] == [0.0, 7.0]


def test_report_is_one_command_for_runs_and_benchmarks(tmp_path, capsys):
    fill(tmp_path / "made", ["rwr"], seeds=1, samples=False)
    main(["report", str(tmp_path / "made")])
    assert capsys.readouterr().out == f"report: {tmp_path / 'made' / 'report.html'}\n"


@pytest.mark.parametrize(
    ("prepare", "options", "message"),
    [
        (lambda folder: None, [], "holds neither a run .* nor a benchmark"),
        (lambda folder: (folder / "records").mkdir(), [], "holds no benchmark"),
        (lambda folder: fill(folder, ["rwr"], 2, False), ["--seed", "7"], r"seed=7 is of no finished run; .* \[0, 1\]"),
        (lambda folder: (folder / "config.json").touch(), ["--seed", "1"], "seed=1 chooses pictures of a benchmark"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, capsys, prepare, options, message):
    prepare(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["report", str(tmp_path), *options])
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 1
    assert re.search(message, lines[0])
