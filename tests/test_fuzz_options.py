"""Any word on any command line: it works up to what is expensive, or it is refused in one line that names it."""

from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion_gym.agents.benchmark.command import BenchOptions
from diffusion_gym.agents.cli import EvalOptions, ReportOptions
from diffusion_gym.agents.demo import DemoOptions
from diffusion_gym.agents.downloads import DownloadOptions
from diffusion_gym.agents.presets_table import PresetsOptions
from diffusion_gym.agents.training import runs
from diffusion_gym.agents.training.env_options import EnvOptions
from diffusion_gym.agents.training.reward_options import ServeRewardOptions
from diffusion_gym.agents.training.settings import RunSettings, starting_point
from diffusion_gym.rewards.server.limits import Limits
from fuzzing import WORDS, bounded, command, stop_what_is_expensive

ENV = "DiffusionDenoise-Shapes-Color-v0"
AGENT = "ddpo_is"
OTHERS = {
    "presets": ([], [PresetsOptions]),
    "eval": (["OUT"], [EvalOptions]),
    "report": (["OUT"], [ReportOptions]),
    "demo": (["--out", "OUT"], [DemoOptions]),
    "bench": (["--suite", "smoke", "--out", "OUT"], [BenchOptions]),
    "serve-reward": (["Compressibility", "--port", "0"], [ServeRewardOptions, Limits]),
    "download": (["Shapes"], [DownloadOptions]),
}


def names(*kinds, prefix="--"):
    return [prefix + entry.name.replace("_", "-") for kind in kinds for entry in fields(kind)]


TRAIN = sorted(
    {*names(RunSettings), *names(EnvOptions, prefix="--env.")}
    | set(names(type(starting_point(ENV, AGENT, None, None).agent_options), prefix="--agent."))
)


@pytest.fixture(autouse=True)
def nothing_expensive(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    stop_what_is_expensive(monkeypatch)


def harmless(word):
    """No name of a hub, which would be asked."""
    return "/" not in word


@st.composite
def options(draw, known):
    """One or two options of a command with any values, now and then misspelt or without one."""
    words = []
    for _ in range(draw(st.integers(1, 2))):
        misspelt = not draw(st.integers(0, 9))
        name = "--" + draw(WORDS)[:20] if misspelt else draw(st.sampled_from(known))
        number = draw(st.sampled_from([1, 1, 1, 1, 0, 2]))
        values = draw(st.lists(WORDS.filter(harmless), min_size=number, max_size=number))
        words += [f"{name}={values[0]}"] if values and draw(st.booleans()) else [name, *values]
    return words


def option_values(words):
    """The words after each option of a command line, the last ones where it stands there several times."""
    found, values = {}, []
    for word in words:
        name, mark, value = word.partition("=")
        if name in TRAIN:
            found[name] = values = [value] if mark else []
        else:
            values.append(word)
    return found


def says(value, words):
    """Whether an option has the value that these words say."""
    if isinstance(value, bool):
        return words == [] or words == [str(value)]
    if isinstance(value, tuple):
        return len(value) == len(words) and all(says(part, [word]) for part, word in zip(value, words, strict=True))
    if isinstance(value, dict):
        return [str(part) for pair in value.items() for part in pair] == words
    if isinstance(value, int | float):
        return len(words) == 1 and float(words[0]) == value
    return words == [str(value)] or (isinstance(value, Path) and words == [""])


def chosen(settings, option):
    """The value of an option of `train`."""
    part, _, name = option.removeprefix("--").replace("-", "_").rpartition(".")
    return getattr({"": settings, "env": settings.env_options, "agent": settings.agent_options}[part], name)


@bounded(60)
@given(words=options(TRAIN))
def test_train(tmp_path, words):
    """What is not refused is trained with, as it was written."""
    trained, train = [], runs.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "train", lambda settings: [trained.append(settings), train(settings)][1])
        refused = command(["train", "--env", ENV, "--agent", AGENT, "--out", tmp_path / "run", *words])
    assert not (tmp_path / "run" / "config.json").exists()
    if trained and not refused:
        for option, values in option_values(words).items():
            assert says(chosen(trained[0], option), values), (option, values, chosen(trained[0], option))


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_command(tmp_path, name):
    base, kinds = OTHERS[name]

    @bounded(12)
    @given(words=options([entry for entry in names(*kinds) if entry != "--limits"]))
    def check(words):
        command([name, *(str(tmp_path / "out") if part == "OUT" else part for part in base), *words])

    check()


@bounded(12)
@given(words=st.lists(WORDS.filter(harmless), max_size=3))
def test_any_words(tmp_path, words):
    if words != ["demo"]:
        command(words)
