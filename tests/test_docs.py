"""The Python of the README and of docs/: every page runs in a test, or at least compiles and defines its names."""

import re
import shlex
import subprocess
import sys

import pytest

from diffusion_gym.agents.cli import parse_train
from diffusion_gym.agents.demo import RECIPES
from diffusion_gym.envs.registration import environment_ids
from pages import PAGES, ROOT, assert_links_exist, python_blocks, run_page

README_PATH = PAGES["README.md"]
README = README_PATH.read_text(encoding="utf-8")
# What those pages need is not there: the weights of SD 1.4 and of a VLM, and a package that only old libraries run.
FRAGMENTS = {"prompt-alignment.md", "reward-server.md"}
# Run here, with fewer pictures; every other page has a test of its own, which names it.
SMALLER = {
    "README.md": {"num_envs=16": "num_envs=2", "16 * 20": "2 * 20"},
    "first-minutes.md": {"num_envs=64": "num_envs=4"},
    "bring-your-own.md": {"=10, num_envs=16": "=2, num_envs=4", "16 * 10": "4 * 2", "=16": "=4"},
    "bring-your-own-algorithm.md": {"num_envs=16": "num_envs=4"},
    "tracking.md": {
        **{"num_envs=16": "num_envs=2", "=128": "=4", "=64": "=2", "paths=16": "paths=1"},
        "num_inference_steps=5": "num_inference_steps=2",
    },
    "scale-out.md": {"num_envs=8": "num_envs=2", "=32": "=4", "=16": "=2", "steps=5": "steps=2"},
}
WITH_PYTHON = [name for name in PAGES if python_blocks(name)]
SCRIPTS = [name for name in WITH_PYTHON if not python_blocks(name)[0].startswith(">>>")]


def test_every_page_with_python_is_run_by_a_test():
    tests = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    texts = [text for path, text in tests.items() if path.name != "test_docs.py"]
    elsewhere = {name for name in WITH_PYTHON if any(name in text and "run_page" in text for text in texts)}
    doctests = {name for name in WITH_PYTHON if any(name in text and "doctest" in text for text in texts)}
    custom = {"custom-agents.md"}  # tests/agents/test_custom_agent.py trains its agent
    assert set(WITH_PYTHON) - elsewhere - doctests - custom - FRAGMENTS == set(SMALLER)
    assert len(SCRIPTS) >= 8


def test_the_readme_fits_on_a_page():
    assert len(README.splitlines()) <= 120


def test_the_commands_of_the_first_pages_are_understood():
    """Each `diffusion-gym train` of the README and of the first minutes that begins a run is the demo's."""
    text = README + PAGES["first-minutes.md"].read_text(encoding="utf-8")
    commands = [
        shlex.split(each, comments=True) for each in re.findall(r"^    diffusion-gym train (.*)$", text, flags=re.M)
    ]
    begun = [parse_train(command) for command in commands if "--resume" not in command]
    assert [(settings.agent, settings.preset) for settings in begun] == [RECIPES["Shapes"]] * 2


def undefined(code):
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821,F823", "--quiet", "-"]
    return subprocess.run(command, input=code, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_python_compiles_and_no_name_comes_from_nowhere(name):
    """Blocks of a page follow one another, as in a notebook."""
    code = "\n".join(python_blocks(name))
    compile(code, name, "exec")
    done = undefined(code)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_name_from_nowhere_is_found():
    done = undefined("Trainer(envs)")
    assert done.returncode == 1 and "Trainer" in done.stdout


@pytest.mark.parametrize("name", SMALLER)
def test_the_python_of_the_page_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scope = run_page(name, SMALLER[name])
    if name == "first-minutes.md":
        assert scope["done"] and scope["info"]["image"].shape == (32, 32, 3) and scope["action"].shape == (4, 4, 8, 8)
    elif name == "bring-your-own-algorithm.md":  # its assertions are the contract
        assert sum(block.count("assert") for block in python_blocks(name)) >= 14
    elif name == "README.md":
        assert scope["done"] and scope["model"].num_timesteps == 2 * 20
    elif name != "bring-your-own.md":
        (metrics,) = tmp_path.rglob("metrics.jsonl")
        assert len(metrics.read_text().splitlines()) == 2


# A bare id has Gymnasium warn that it stands for the newest version.
BARE = re.compile(r"\bDiffusionDenoise-[A-Z]\w*-[A-Z]\w*(?!-v\d|\w)")
TEXTS = [README_PATH, *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.*"), *(ROOT / "agents").rglob("*.py")]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_id_has_its_version(path):
    assert not BARE.findall(path.read_text(encoding="utf-8"))


def test_a_bare_id_is_found():
    assert BARE.findall("`DiffusionDenoise-Shapes-Color` DiffusionDenoise-SD14-OCR-v0 DiffusionDenoise-v0") == [
        "DiffusionDenoise-Shapes-Color"
    ]


@pytest.mark.parametrize("name", PAGES)
def test_every_linked_file_and_section_exists(name):
    assert_links_exist(name)


def test_the_readme_says_of_which_reward_its_snippet_and_its_tables_are():
    text = " ".join(README.split())
    snippet, after = text.split("## The environment in ten lines")[1].split("This reward is graded", 1)
    assert "strict" not in snippet and "strict success" in after and '{"strict": True}' in after


def test_every_environment_of_the_readme_is_registered():
    table = README.split("## Environments")[1].split("## ")[0]
    rows = [row.split("|")[1:3] for row in table.splitlines() if row.startswith("| `")]
    models_and_rewards = [[re.findall(r"`(\w+)`", cell) for cell in row] for row in rows]
    named = [f"{model}-{reward}" for models, rewards in models_and_rewards for model in models for reward in rewards]
    assert sorted(named) == sorted(
        id_.removeprefix("DiffusionDenoise-").removesuffix("-v0") for id_ in environment_ids()
    )
    listed = [model for models, _ in models_and_rewards for model in models]
    assert len(listed) == len(set(listed)) and all(rewards for _, rewards in models_and_rewards)
