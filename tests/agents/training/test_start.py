"""A start that fails leaves nothing in the way of the corrected command; a resumption that fails changes nothing."""

import json
import sys

import pytest

from command_line import failure, train_arguments
from diffusion_gym.agents.cli import main
from diffusion_gym.agents.training.runs import check_new

REWARD = """
CALLS = []

def bad(images, prompts, metadata):
    CALLS.append(None)
    if len(CALLS) >= {first}:
        raise RuntimeError("no server")
    return images.mean((1, 2, 3))

def good(images, prompts, metadata):
    return images.mean((1, 2, 3))
"""


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    """`rewards(first)`: the module `own_rewards` whose `bad` fails from its call number `first` on."""
    monkeypatch.chdir(tmp_path)

    def write(first):
        (tmp_path / "own_rewards.py").write_text(REWARD.format(first=first))

    yield write
    sys.modules.pop("own_rewards", None)


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("first", [1, 3])  # in the first pictures; in the second batch of the first iteration
def test_a_reward_that_fails_at_the_start(tiny_pipeline, tmp_path, capsys, rewards, first):
    rewards(first)
    out = tmp_path / "run"
    bad = train_arguments(tiny_pipeline, out, **{"--env.reward": "own_rewards:bad", "--pictures-every": 1})
    assert "no server" in failure(bad, capsys)
    assert (out / "config.json").exists()
    check_new(out)
    main(train_arguments(tiny_pipeline, out, **{"--env.reward": "own_rewards:good"}))
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2
    assert json.loads((out / "config.json").read_text())["settings"]["env_options"]["reward"] == "own_rewards:good"
    with pytest.raises(FileExistsError, match="already holds a run"):
        check_new(out)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--seed": -1}, "seed=-1 must be at least 0"),
        ({"--rollout-batch": 0}, "rollout_batch=0 must be at least 1"),
        ({"--env.prompts": "nothing.txt"}, "nothing.txt"),
        ({"--agent.adam-beta1": 1.0}, "adam_beta1=1.0 must be at least 0 and less than 1"),
        ({"--agent.adam-epsilon": "nan"}, "adam_epsilon=nan must be finite"),
        ({"--resume-from-older": ""}, "give --resume too"),
    ],
)
def test_a_mistake_leaves_no_folder(tiny_pipeline, tmp_path, capsys, change, message):
    arguments = [part for part in train_arguments(tiny_pipeline, tmp_path / "run", **change) if part]
    assert message in failure(arguments, capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "other", ["notes.txt", "images/mine.png", "checkpoints/iteration-000003.safetensors", "model/x"]
)
def test_only_what_such_a_start_left_is_taken(tmp_path, other):
    (tmp_path / "config.json").write_text('{"settings": {}, "versions": {}}')
    check_new(tmp_path)
    (tmp_path / other).parent.mkdir(exist_ok=True)
    (tmp_path / other).write_text("mine")
    with pytest.raises(FileExistsError, match="already holds a run"):
        check_new(tmp_path)


def test_a_config_of_another_program_and_links_are_not_taken(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text('{"model_type": "clip"}')
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_text('{"settings": {}, "versions": {}}')
    (tmp_path / "b" / "images").symlink_to(tmp_path / "a")
    for name in ("a", "b"):
        with pytest.raises(FileExistsError, match="already holds a run"):
            check_new(tmp_path / name)


def test_a_resumption_that_fails_changes_nothing(tiny_pipeline, tmp_path, capsys):
    out = tmp_path / "run"
    main(train_arguments(tiny_pipeline, out, **{"--checkpoint-every": 1}))
    resume = ["train", "--resume", "--out", str(out), "--total-reward-queries", "24"]
    newest = sorted((out / "checkpoints").iterdir())[-1]
    whole = newest.read_bytes()
    newest.write_bytes(whole[:-64])
    before = files(out)
    assert "iteration-000001.safetensors is whole" in failure(resume, capsys)
    assert files(out) == before
    main([*resume, "--resume-from-older"])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2, 3]

    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join([lines[0], "oops\n", *lines[1:]]))
    with pytest.warns(UserWarning, match="metrics.jsonl: all but line 2 is read"):
        main([*resume[:-1], "32"])
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert lines[1] == "oops" and [json.loads(line)["iteration"] for line in [lines[0], *lines[2:]]] == [1, 2, 3, 4]
