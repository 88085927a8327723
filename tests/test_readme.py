"""The README must agree with the results in the repository, and its code must run."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_python_of_the_readme_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(blocks) == 5
    scope = {}
    for block in blocks:
        exec(block, scope)
    assert scope["done"] and scope["info"]["image"].shape == (32, 32, 3)
    assert scope["action"].shape == (64, 4, 8, 8)


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
