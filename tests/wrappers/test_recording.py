"""Finished pictures on disk: the right ones, with their own prompts and rewards, whole or not at all."""

import json

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from PIL import Image

from diffusion_gym.rewards import RewardOutput
from diffusion_gym.testing.conformance import check_vector_env
from diffusion_gym.wrappers import RecordPicturesVectorEnv, recording

NUMBER, T = 3, 4


def scored(images, prompts, metadata):
    scores = images.mean((1, 2, 3))
    return RewardOutput(scores, {"length": torch.tensor([float(len(prompt)) for prompt in prompts])})


@pytest.fixture
def make(make_env):
    def made(number=NUMBER, **keywords):
        return make_env(number, **{"reward": scored, "prompts": "shapes-location", "output": "numpy", **keywords})

    return made


def lines(folder):
    return [json.loads(line) for line in (folder / "pictures.jsonl").read_text().splitlines()]


def reset_first(env):
    return env.reset(options={"reset_mask": np.array([True] + [False] * (env.num_envs - 1))})


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("output", ["numpy", "torch"])
def test_each_picture_is_saved_with_its_line(make, play, tmp_path, mode, output):
    """Env 0 ends a step after the others, where the mode goes on."""
    env = RecordPicturesVectorEnv(make(autoreset_mode=mode, output=output), tmp_path)
    played = play(env, T + (mode != AutoresetMode.DISABLED), after=reset_first)
    starts = [*played[2].infos["prompt"][:1], *played[0].infos["prompt"][1:]]
    wanted = [(1, played[5]), (2, played[5])]
    if mode != AutoresetMode.DISABLED:
        wanted.append((0, played[6]))
    found = lines(tmp_path)
    assert len(found) == len(wanted)
    for episode, (row, (index, end)) in enumerate(zip(found, wanted, strict=True)):
        final = end.infos.get("final_info", end.infos)
        assert row == {
            "episode": episode,
            "env": index,
            "prompt": starts[index],
            "reward": pytest.approx(float(end.rewards[index])),
            "components": {"length": len(starts[index])},
            "file": f"episode-{episode:08d}.png",
        }
        assert row["reward"] > 0
        with Image.open(tmp_path / row["file"]) as picture:
            np.testing.assert_array_equal(np.asarray(picture), final["image"][index])
    assert len(list(tmp_path.iterdir())) == len(wanted) + 1


def test_every_kth_episode_is_saved(make, play, tmp_path):
    play(RecordPicturesVectorEnv(make(num_inference_steps=1), tmp_path, every=4), 3)  # episodes 0 to 8
    assert [(row["episode"], row["env"]) for row in lines(tmp_path)] == [(0, 0), (4, 1), (8, 2)]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [f"episode-0000000{i}.png" for i in (0, 4, 8)]


def test_a_folder_is_gone_on_with(make, play, tmp_path):
    """The first episode of each part is saved."""
    folder = tmp_path / "new" / "folder"
    for every in (2, 2, 5, 1):
        play(RecordPicturesVectorEnv(make(1, num_inference_steps=1), folder, every), 4)
    assert [row["episode"] for row in lines(folder)] == [0, 2, 4, 6, 10, 11, 12, 13, 14]
    assert len(list(folder.glob("*.png"))) == 9


def test_what_a_kill_left_is_cleared_away(make, play, tmp_path):
    play(RecordPicturesVectorEnv(make(1, num_inference_steps=1), tmp_path), 2)
    with (tmp_path / "pictures.jsonl").open("a") as file:
        file.write('{"episode": 2, "prompt": "a r')
    (tmp_path / ".episode-00000002.png.x.unfinished").write_bytes(b"half")
    play(RecordPicturesVectorEnv(make(1, num_inference_steps=1), tmp_path), 1)
    assert [row["episode"] for row in lines(tmp_path)] == [0, 1, 2]
    assert not list(tmp_path.glob(".*"))


def test_a_picture_that_cannot_be_written_has_no_line(make, play, tmp_path, monkeypatch):
    env = RecordPicturesVectorEnv(make(1, num_inference_steps=1), tmp_path)

    def full(path, data):
        raise OSError("No space left on device")

    monkeypatch.setattr(recording, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        play(env, 1)
    assert not list(tmp_path.iterdir())


def test_failed_rewards_and_foreign_prompts_are_valid_json(make, play, tmp_path):
    prompt = 'ein "großer" Stern\u2028mit Zeilenumbruch\n'
    env = make(1, num_inference_steps=1, prompts=[prompt], reward=lambda *_: torch.tensor([float("nan")]))
    play(RecordPicturesVectorEnv(env, tmp_path), 1)
    (row,) = lines(tmp_path)
    assert (row["prompt"], row["reward"], row["components"]) == (prompt, None, {})


def test_it_conforms(make, tmp_path):
    check_vector_env(
        lambda num_envs, **kinds: RecordPicturesVectorEnv(
            make(num_envs, num_inference_steps=2, **kinds), tmp_path, every=50
        )
    )
    assert len(lines(tmp_path)) > 1


@pytest.mark.parametrize("every", [0, -1, 1.5, "2", True, None])
def test_every_is_checked(make, tmp_path, every):
    with pytest.raises(ValueError, match=f"every={every!r} must be a whole number of at least 1"):
        RecordPicturesVectorEnv(make(1), tmp_path / "folder", every)
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("text", ["no json\n", '{"step": 1}\n', "[1]\n"])
def test_the_log_of_something_else_is_refused(make, tmp_path, text):
    (tmp_path / "pictures.jsonl").write_text(text)
    with pytest.raises(ValueError, match="holds no recordings of pictures; choose another folder"):
        RecordPicturesVectorEnv(make(1), tmp_path)
    assert (tmp_path / "pictures.jsonl").read_text() == text
