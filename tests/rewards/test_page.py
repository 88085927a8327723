"""The page about rewards: its example runs, and it lists every reward and keyword."""

import doctest
import inspect
import re
from pathlib import Path

from diffusion_gym.hub import REWARD_SOURCES
from diffusion_gym.rewards import REWARDS

PAGE = Path(__file__).parents[2] / "docs" / "rewards.md"
WITH_NETWORK = ["Aesthetic", "CLIPScore", "PickScore", "Over50", "Under30", "ImageReward", "HPSv2", "GenEval"]


def test_the_example_runs(tmp_path):
    results = doctest.testfile(str(PAGE), module_relative=False, globs={"folder": tmp_path}, encoding="utf-8")
    assert results.attempted >= 5 and results.failed == 0


def test_every_reward_is_listed():
    table = PAGE.read_text(encoding="utf-8").split("## Weights")[0]
    assert [name for name in REWARDS if f"`{name}`" not in table] == []


def test_weights_and_keywords_are_listed_with_their_defaults():
    text = PAGE.read_text(encoding="utf-8")
    weights, keywords = text.split("## Weights")[1].split("## Keywords")
    listed = set(re.findall(r"`(\w+)`", " ".join(line.split("|")[1] for line in keywords.splitlines() if "|" in line)))
    for name in WITH_NETWORK:
        assert [source for source in REWARD_SOURCES[name] if f"`{source}`" not in weights] == []
        assert set(inspect.signature(REWARDS[name]).parameters) - {"name", "wanted"} <= listed
    for name, default in (("dtype", "`float32`"), ("batch_size", "32")):
        assert re.search(rf"^\| `{name}` \|[^|]*\| {default} \|", keywords, re.MULTILINE)
        assert str(inspect.signature(REWARDS["Aesthetic"]).parameters[name].default) == default.strip("`")
