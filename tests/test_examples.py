"""Every example runs, in a smoke form."""

import json
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name, *arguments):
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_tested_here():
    text = Path(__file__).read_text()
    assert all(f'"{path.name}"' in text for path in EXAMPLES.glob("*.py"))


def test_custom_reward(tmp_path):
    out = tmp_path / "run"
    run("custom_reward.py", "--queries", 16, "--batch", 8, "--out", out)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert abs(rows[0]["reward_mean"] - (rows[0]["red_mean"] - rows[0]["blue_mean"])) < 1e-6


def test_step_an_environment(tmp_path):
    shown = run("step_an_environment.py", "--out", tmp_path / "process.png")
    assert "'a red star left of a blue circle': reward" in shown
    assert (tmp_path / "process.png").stat().st_size > 1000
