"""A mistake on a command line is told in one line, in our words, whatever the output can show."""

import io
import os
import signal
import subprocess
import sys

import pytest
import tyro

from command_line import failure
from diffusion_gym.agents.cli import EvalOptions
from diffusion_gym.agents.command_line import parsed
from diffusion_gym.console import main

PLACES = {"eval": ["eval", "RUN"], "train": ["train", "--env", "DiffusionDenoise-Shapes-Color", "--out", "RUN"]}


class Terminal(io.StringIO):
    """An output with an encoding, by which tyro chooses the lines of its boxes."""

    def __init__(self, encoding):
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self):
        return self._encoding


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize(
    ("command", "words", "told"),
    [
        ("eval", ["--samples", "many"], "--samples: 'many' is no whole number"),
        ("eval", ["--samples", "9" * 5000], "--samples: it has too many digits"),
        ("train", ["--env.eta", "a lot"], "--env.eta: ['a lot'] must be {None}|FLOAT"),
        ("eval", ["--seed"], "Missing value for argument '--seed'. Expected 1 values"),
        ("eval", ["--seeds", "1"], "Unrecognized options: --seeds, 1"),
        ("eval", ["--samples", "x" * 10_000], "--samples: 'xxx"),
        (
            "train",
            ["--track", "paper"],
            "invalid choice 'paper' for argument '--track'. Expected one of",
        ),
        ("train", ["--env.reward-kwargs", "strict"], "--env.reward-kwargs: ['strict'] must be {None}|{[STR STR"),
        ("train", ["--seed", "-1"], "seed=-1 must be at least 0 and less than 2**63"),
    ],
)
def test_one_line(capsys, monkeypatch, command, words, told, encoding):
    monkeypatch.setenv("COLUMNS", "20")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Terminal(encoding))
        error = failure([*PLACES[command], *words], capsys)
    assert error.startswith("error: ") and error.count("\n") == 1 and len(error) < 2_100
    assert told in error and error.endswith(f"; `diffusion-gym {command} --help` explains every option\n")


@pytest.mark.parametrize(("words", "width"), [(["--help"], "60"), (["--seed", "1"], "100000")])
def test_only_help_is_as_wide_as_the_terminal(monkeypatch, words, width):
    found = []
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(tyro, "cli", lambda *args, **options: found.append(os.environ["COLUMNS"]))
    parsed(EvalOptions, words, "eval")
    assert found == [width] and os.environ["COLUMNS"] == "60"


INTERRUPTED = """
import os, signal, sys

class Interrupting:
    def find_spec(self, name, *given):
        if name == "diffusion_gym.agents":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
signal.signal(signal.SIGINT, signal.default_int_handler)
from diffusion_gym.console import main

main()
"""


def test_ctrl_c_while_it_imports():
    ended = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "error: stopped at once\n")


def test_the_program_runs_the_command(monkeypatch, capsys):
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "argv", ["diffusion-gym", "--help"])
    main()
    assert capsys.readouterr().out.startswith("usage: diffusion-gym COMMAND")
    assert signal.getsignal(signal.SIGINT) is before
