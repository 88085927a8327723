"""A mistake on a command line is told in one line, in our words, whatever the output can show."""

import io
import os
import re
import signal
import subprocess
import sys

import pytest
import tyro

from command_line import failure
from diffusion_gym import __version__
from diffusion_gym.agents.algorithms import AGENTS
from diffusion_gym.agents.cli import _COMMANDS, EvalOptions
from diffusion_gym.agents.cli import main as run
from diffusion_gym.agents.command_line import parsed
from diffusion_gym.agents.completion import _OPTIONS, SHELLS
from diffusion_gym_launcher import run_command

EVERY = {"eval": "--help", "train": "--help-all"}
PLACES = {"eval": ["eval", "RUN"], "train": ["train", "--env", "DiffusionDenoise-Shapes-Color-v0", "--out", "RUN"]}


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
    assert told in error and error.endswith(f"; `diffusion-gym {command} {EVERY[command]}` explains every option\n")


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
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
signal.signal(signal.SIGINT, signal.default_int_handler)
from diffusion_gym_launcher import run_command

run_command()
"""


@pytest.mark.parametrize("imported", ["torch", "diffusion_gym.agents"])
def test_ctrl_c_while_it_imports(imported):
    ended = subprocess.run([sys.executable, "-c", INTERRUPTED, imported], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "error: stopped at once\n")


def test_the_program_runs_the_command(monkeypatch, capsys):
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "argv", ["diffusion-gym", "--help"])
    run_command()
    assert capsys.readouterr().out.startswith("usage: diffusion-gym COMMAND")
    assert signal.getsignal(signal.SIGINT) is before


def helped(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        run(["train", *words])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    return text, re.findall(r"^[│ ]*(--[a-z][\w.-]+)", text, flags=re.M)


@pytest.mark.parametrize("agent", AGENTS)
def test_the_help_of_train_shows_about_twenty_options_and_where_the_others_are(capsys, agent):
    text, short = helped(capsys, "--help", "--agent", agent)
    _, every = helped(capsys, "--help-all", "--agent", agent)
    assert 17 <= len(short) <= 22 and set(short) < set(every)
    assert {"--env", "--out", "--agent.learning-rate"} <= set(short)
    assert f"of {len(every)} in all: `diffusion-gym train --help-all`" in " ".join(text.split())


def test_the_short_help_has_the_values_of_the_preset_and_the_texts_of_the_options(capsys):
    text, _ = helped(capsys, "-h", "--env", "DiffusionDenoise-Shapes-Color-v0", "--preset", "shapes-demo")
    assert "(default: shapes-demo)" in text and "T, the number of denoising steps. (default: 10)" in text


def test_alone_it_says_what_to_do_next(capsys):
    run([])
    text = capsys.readouterr().out
    assert all(f"\n  {command} " in text for command in _COMMANDS)
    commands = re.findall(r"^  diffusion-gym (\S+)", text.partition("New here?")[2], flags=re.M)
    assert commands == ["demo", "train", "eval", "report"]


def test_the_version(capsys):
    run(["--version"])
    assert capsys.readouterr().out == f"diffusion-gym {__version__}\n"


def test_completion_knows_every_command():
    assert list(_OPTIONS) == list(_COMMANDS)


def test_the_shell_completes_commands_options_and_values(capsys, tmp_path):
    with pytest.raises(SystemExit):
        run(["--tyro-print-completion", "bash"])
    script = tmp_path / "completion.bash"
    script.write_text(capsys.readouterr().out)
    wanted = {
        "tr": "train",
        "train --agent.clip": "--agent.clip-range",
        "train --env.mod": "--env.model",
        "demo --mod": "--model",
        "fit-preferences --ou": "--out",
    }
    for words, completed in wanted.items():
        line = f"COMP_WORDS=(diffusion-gym {words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _tyro_diffusion_gym"
        code = f'source "{script}"; {line}; echo "${{COMPREPLY[@]}}"'
        shown = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
        assert shown.stdout.split() == [completed], (words, shown)


@pytest.mark.parametrize("words", [["bash", "x"], ["csh"], []])
def test_completion_of_an_unknown_shell_is_refused(capsys, words):
    error = failure(["--tyro-print-completion", *words], capsys)
    assert f"the shell one of {', '.join(SHELLS)}" in error
    assert "is unknown; completion is by" in failure(["--tyro-complete", "bash"], capsys)
