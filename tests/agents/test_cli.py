"""The command line as a user meets it: end to end, and its answers to mistakes."""

import json
import os
import re
import subprocess
import sys

import pytest

from command_line import failure, train_arguments
from diffusion_gym.agents.cli import main


def test_train_eval_and_report(tiny_pipeline, tmp_path, capsys):
    out = tmp_path / "run"
    main(train_arguments(tiny_pipeline, out))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["reward_queries"] for row in rows] == [8, 16]
    assert all({"iteration", "reward_queries", "reward_mean", "seconds"} <= set(row) for row in rows)
    capsys.readouterr()
    main(["eval", str(out), "--samples", "8", "--json"])
    result = json.loads(capsys.readouterr().out)
    keys = {"reward_mean", "reward_ci95", "base_reward_mean", "base_reward_ci95", "kl_to_base"}
    assert keys <= set(result)
    assert result["reward_ci95"][0] <= result["reward_mean"] <= result["reward_ci95"][1]
    main(["report", str(out)])
    assert (out / "report.html").stat().st_size > 1000
    assert {path.name for path in out.iterdir()} >= {"config.json", "checkpoints", "images", "model"}


def test_resume_goes_on_with_the_settings_of_the_run(tiny_pipeline, tmp_path, capsys):
    out = tmp_path / "run"
    main(train_arguments(tiny_pipeline, out))
    main(["train", "--resume", "--out", str(out), "--total-reward-queries", "24"])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["reward_queries"] for row in rows] == [8, 16, 24]
    error = failure(["train", "--resume", "--out", str(out), "--seed", "5"], capsys)
    assert "seed=5 differs from the run's own 0" in error


def test_a_taken_run_folder_is_refused_and_left_alone(tiny_pipeline, tmp_path, capsys):
    out = tmp_path / "run"
    main(train_arguments(tiny_pipeline, out))
    before = (out / "metrics.jsonl").read_bytes()
    assert "already holds a run; go on with --resume" in failure(train_arguments(tiny_pipeline, out), capsys)
    assert (out / "metrics.jsonl").read_bytes() == before
    other = tmp_path / "notes"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    assert "is not empty" in failure(train_arguments(tiny_pipeline, other), capsys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--agent": "ddpo_iss"}, "agent='ddpo_iss' is unknown; did you mean 'ddpo_is'?"),
        ({"--preset": "shape"}, "preset='shape' is unknown; did you mean 'shapes'?"),
        ({"--env": "DiffusionDenoise-Shapes-Compositon"}, "DiffusionDenoise-Shapes-Composition"),
        ({"--env.reward": "Compresibility"}, "reward='Compresibility' is unknown; did you mean 'Compressibility'?"),
        ({"--env.eta": "0"}, "eta=0.0 makes every denoising step deterministic"),
        ({"--env.eta": "1.5"}, "eta=1.5 must lie in [0, 1]"),
        ({"--env.num-inference-steps": "2000"}, "num_inference_steps=2000 is larger than the model's schedule"),
        ({"--rollout-batch": "3"}, "samples_per_iteration=8 must be a multiple of the rollout's batch, num_envs=3"),
        ({"--agent.learning-rate": "-1"}, "learning_rate=-1.0 must be larger than 0"),
        ({"--env.model": "nowhere/at-all/here"}, "model='nowhere/at-all/here' is no path here and no hub id"),
    ],
)
def test_a_mistake_gets_one_clear_line(tiny_pipeline, tmp_path, capsys, change, message):
    error = failure(train_arguments(tiny_pipeline, tmp_path / "run", **change), capsys)
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_train_without_an_environment(tmp_path, capsys):
    assert "--env is missing" in failure(["train", "--out", str(tmp_path / "run")], capsys)


def test_the_help_says_that_the_environment_is_required(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    told = capsys.readouterr().out
    assert re.search(r"--env STR.*?\(required\)", told, flags=re.S)
    assert "DiffusionDenoise-Shapes-Composition-v0;" in told and "(default: DiffusionDenoise" not in told


def test_a_mistake_keeps_its_traceback_where_it_is_asked_for(tmp_path):
    with pytest.raises(OSError, match="holds no run"):
        main(["eval", str(tmp_path / "nothing"), "--traceback"])


def test_eval_of_a_folder_without_a_run(tmp_path, capsys):
    assert "holds no run (no config.json)" in failure(["eval", str(tmp_path)], capsys)


def test_a_foreign_config_is_named(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"settings": {"model": "bert"}}')
    assert "is no config of a diffusion-gym run" in failure(["eval", str(tmp_path)], capsys)


def test_the_console_shows_our_own_lines_only(tiny_pipeline, tmp_path):
    command = [sys.executable, "-m", "diffusion_gym.agents.cli", *train_arguments(tiny_pipeline, tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()]
    assert re.fullmatch(r"16 images to score, 2 iterations: about \d+ s", lines[0])
    assert all(re.match(r"\d+/16 images \(\d+%\), reward ", line) for line in lines[1:]), done.stderr
    assert done.stdout.startswith("ddpo_is on DiffusionDenoise-v0")


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--agent.clip-range" in text and "--env.guidance-scale" in text and "--total-reward-queries" in text


@pytest.mark.parametrize(
    "words, meant",
    [
        (["--agent.lr", "1e-3"], "--agent.learning-rate"),
        (["--lr=1e-3"], "--agent.learning-rate"),
        (["--learning_rate", "1e-3"], "--agent.learning-rate"),
        (["--agent.learning-rat", "1e-3"], "--agent.learning-rate"),
        (["--guidance-scale", "3"], "--env.guidance-scale"),
        (["--agent.guidance-scale", "3"], "--env.guidance-scale"),
        (["--envv", "x"], "--env"),
        (["--agent.no-cfg-training", "--agent.no-cfg-trainin"], "--agent.cfg-training"),
    ],
)
def test_a_wrong_option_is_told_which_one_may_be_meant(capsys, words, meant):
    error = failure(["train", "--env", "DiffusionDenoise-Shapes-Color", "--out", "unused", *words], capsys)
    assert "is no option of train; did you mean" in error and re.search(rf" {re.escape(meant)}(\?| or )", error), error


def test_an_interruption_before_the_command_begins_is_one_line_too(monkeypatch, capsys):
    def interrupt(*args, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr("warnings.filterwarnings", interrupt)
    with pytest.raises(SystemExit) as ended:
        main(["presets"])
    assert ended.value.code == 130 and capsys.readouterr().err.count("\n") == 1
