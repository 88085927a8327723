"""The program that writes tiny random checkpoints."""

import json
import shlex
import subprocess
import sys

import pytest

from diffusion_gym.agents.cli import parse_train


def run(*arguments):
    command = [sys.executable, "-m", "diffusion_gym.testing.random_checkpoints", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_wrong_name_is_one_line(tmp_path):
    done = run("Aestetic", tmp_path / "out")
    assert done.returncode == 2 and not done.stdout
    [line] = done.stderr.splitlines()  # and no RuntimeWarning of Python
    assert line.startswith("error: name='Aestetic'") and "Aesthetic, CLIPScore" in line


@pytest.mark.slow
def test_keywords_are_printed_as_json_and_as_options(tmp_path):
    done = run("Aesthetic", tmp_path / "a folder")
    keywords = json.loads(done.stdout)
    assert set(keywords) == {"clip", "head"}
    [line] = done.stderr.splitlines()
    options = shlex.split(line)
    settings = parse_train(["--env", "DiffusionDenoise-SD14-Aesthetic", "--out", str(tmp_path / "run"), *options])
    assert settings.env_options.reward_kwargs == keywords
