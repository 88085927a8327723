"""The README, and the pages that its code moved to, agree with the repository, and their code runs."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def run_python(text, number, scope):
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert len(blocks) == number
    for block in blocks:
        exec(block, scope)
    return scope


def test_the_readme_fits_on_a_page():
    assert len(README.splitlines()) <= 120


def test_the_python_of_the_readme_runs(capsys):
    scope = run_python(README, 2, {})
    assert scope["done"] and scope["info"]["image"].shape == (32, 32, 3)
    assert scope["model"].num_timesteps == 16 * 20


def test_the_python_of_the_first_minutes_runs(capsys):
    """docs/first-minutes.md: python for one environment and for the vectorised one."""
    scope = run_python((ROOT / "docs" / "first-minutes.md").read_text(encoding="utf-8"), 2, {})
    assert scope["done"] and scope["action"].shape == (64, 4, 8, 8)


def test_the_python_of_bring_your_own_runs(capsys):
    """docs/bring-your-own.md: python with SB3, Tianshou, a loop, a reward and prompts."""
    scope = run_python((ROOT / "docs" / "bring-your-own.md").read_text(encoding="utf-8"), 5, {})
    assert scope["envs"].num_envs == 2 and scope["model"].num_timesteps == 160


def test_the_commands_of_the_readme_are_understood(tmp_path, monkeypatch):
    """Each `diffusion-gym train` of the README and of the first minutes that begins a run."""
    from diffusion_gym.agents.cli import parse_train

    text = README + (ROOT / "docs" / "first-minutes.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    diffusion-gym train (.*)$", text, flags=re.M)
    begun = [command.split() for command in commands if "--resume" not in command]
    assert len(begun) == 2 and all(parse_train(command).total_reward_queries == 6400 for command in begun)


def test_every_linked_file_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_every_environment_of_the_table_is_registered():
    from diffusion_gym.envs.registration import environment_ids

    table = README.split("## Environments")[1].split("## ")[0]
    rows = [row.split("|")[1:3] for row in table.splitlines() if row.startswith("| `")]
    models_and_rewards = [[re.findall(r"`(\w+)`", cell) for cell in row] for row in rows]
    named = {f"{model}-{reward}" for models, rewards in models_and_rewards for model in models for reward in rewards}
    assert named == {id_.removeprefix("DiffusionDenoise-").removesuffix("-v0") for id_ in environment_ids()}
