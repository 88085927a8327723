"""The program's start: what `--help` and `--version` say, and that they import none of what takes seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

import diffusion_gym
import diffusion_gym_launcher
from diffusion_gym.agents import cli

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "numpy", "scipy", "gymnasium", "pydantic", "tyro", "diffusers", "transformers", "diffusion_gym"}
START = f"""
import sys
from diffusion_gym_launcher import main

main()
print(sorted({HEAVY} & set(sys.modules)), len(sys.modules))
"""


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"], ["--help", "train"], ["--version"]])
def test_help_and_version_import_nothing_that_takes_seconds(words):
    done = subprocess.run([sys.executable, "-c", START, *words], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    *said, imported = done.stdout.splitlines()
    expected = f"diffusion-gym {diffusion_gym.__version__}" if "--version" in words else cli._USAGE
    assert "\n".join(said) == expected
    assert imported.startswith("[] ") and int(imported.removeprefix("[] ")) < 150


@pytest.mark.parametrize("words", [["envs", "--help"], ["--traceback", "--help"], ["nonsense"]])
def test_everything_else_is_a_command(monkeypatch, words):
    ran = []
    monkeypatch.setattr(sys, "argv", ["diffusion-gym", *words])
    monkeypatch.setattr("diffusion_gym_launcher.run_command", lambda: ran.append(sys.argv[1:]))
    diffusion_gym_launcher.main()
    assert ran == [words]


def test_a_constant_that_is_not_there_is_named():
    with pytest.raises(AttributeError, match="_version.py has no NOTHING"):
        diffusion_gym_launcher._constant("_version.py", "NOTHING")


def test_importing_the_package_leaves_the_slow_libraries_out():
    """torch and Gymnasium are needed to register; these are not."""
    slow = ["diffusers", "transformers", "peft", "accelerate", "scipy", "matplotlib", "tensorboard", "tyro"]
    slow += ["pandas", "jinja2", "torch._dynamo", "diffusion_gym.agents"]
    code = f"import sys, diffusion_gym; print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("[]\n", "")
