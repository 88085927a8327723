"""What holds for every reward with a vision model in process, on its tiny random checkpoint."""

import json
import subprocess
import sys

import gymnasium as gym
import huggingface_hub
import pytest
import torch

from diffusion_gym.hub import REWARD_SOURCES
from diffusion_gym.rewards import REWARDS, evaluate, make_reward
from diffusion_gym.rewards.vision import VisionReward
from diffusion_gym.testing.random_checkpoints import CHECKPOINTS
from waiting import at_once

NAMES = ["Aesthetic", "CLIPScore", "PickScore", "Over50", "Under30", "ImageReward", "HPSv2"]
PROMPTS = ["a red circle", "two blue stars", "a cat", "four wolves", ""]

pytestmark = pytest.mark.parametrize("name", NAMES)


def test_parts_score_as_the_whole_does(name, checkpoint, pictures):
    images, _ = pictures(5, 40, 40)
    whole = evaluate(make_reward(name, batch_size=5, **checkpoint(name)), images, PROMPTS)
    parts = evaluate(make_reward(name, batch_size=2, **checkpoint(name)), images, PROMPTS)
    for key, value in {"scores": whole.scores, **whole.info}.items():
        torch.testing.assert_close(parts.scores if key == "scores" else parts.info[key], value, atol=1e-4, rtol=1e-4)
    assert whole.scores.unique().numel() == 5


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (64, 40), (96, 96)])
def test_every_size_is_scored_without_gradient_where_pictures_have_none(name, size, checkpoint, pictures):
    images = pictures(2, *size)[0]
    output = make_reward(name, **checkpoint(name))(images, PROMPTS[:2], [{}, {}])
    for value in (output.scores, *output.info.values()):
        assert value.shape == (2,) and value.dtype == torch.float32 and value.isfinite().all()
        assert not value.requires_grad


def test_bfloat16_weights_score_nearly_the_same(name, checkpoint, pictures):
    images, _ = pictures(5, 32, 32)
    exact = evaluate(make_reward(name, **checkpoint(name)), images, PROMPTS).scores
    rough = evaluate(make_reward(name, dtype="bfloat16", **checkpoint(name)), images, PROMPTS).scores
    assert not torch.equal(exact, rough)
    assert (exact - rough).abs().max() < 0.1 * max(1.0, exact.abs().max().item())


def test_named_device_is_where_it_runs_and_scores_return(name, checkpoint, pictures):
    images, _ = pictures(2, 32, 32)
    reward = make_reward(name, device="cpu", **checkpoint(name))
    assert reward.device == torch.device("cpu")
    output = evaluate(reward, images, PROMPTS[:2])
    assert torch.equal(output.scores, evaluate(make_reward(name, **checkpoint(name)), images, PROMPTS[:2]).scores)


@pytest.mark.gpu
def test_gpu_scores_as_the_cpu_does(name, checkpoint, pictures):
    images, _ = pictures(5, 48, 48)
    reward = make_reward(name, **checkpoint(name))
    expected = evaluate(reward, images, PROMPTS).scores
    scores = evaluate(reward, images.cuda(), PROMPTS).scores
    assert scores.device.type == "cuda"
    torch.testing.assert_close(scores.cpu(), expected, atol=0.05, rtol=0.02)
    torch.testing.assert_close(evaluate(reward, images, PROMPTS).scores, expected)  # and back on the CPU


@pytest.mark.parametrize(
    ("keyword", "value", "message"),
    [("batch_size", 0, "batch_size=0"), ("dtype", "int8", "dtype='int8'"), ("device", "abacus", "device='abacus'")],
)
def test_values_out_of_range_are_named(name, keyword, value, message, checkpoint):
    with pytest.raises(ValueError, match=message):
        make_reward(name, **{**checkpoint(name), keyword: value})


def test_unknown_keyword_is_an_error(name, checkpoint):
    with pytest.raises(TypeError, match="batchsize"):
        make_reward(name, batchsize=3, **checkpoint(name))


def test_weights_that_are_nowhere_are_reported_at_once(name, tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with at_once(), pytest.raises(FileNotFoundError, match=r"reward_kwargs\['\w+'\]='[\w.-]+/[\w.-]+'") as caught:
        gym.make("DiffusionDenoise-v0", model=str(tiny_pipeline), reward=name)
    assert any(source in str(caught.value) for source in REWARD_SOURCES[name])
    assert "diffusion-gym download" in str(caught.value)


def test_environment_ends_in_its_score(name, checkpoint, tiny_pipeline):
    kwargs = checkpoint(name)
    env = gym.make_vec(
        "DiffusionDenoise-v0",
        num_envs=2,
        model=str(tiny_pipeline),
        reward=name,
        reward_kwargs=kwargs,
        prompts=["a red circle"],
        num_inference_steps=1,
        autoreset_mode="Disabled",
    )
    observation, _ = env.reset(seed=0)
    _, rewards, ended, _, info = env.step(observation["latents"])
    assert ended.all()
    images = info["image"].permute(0, 3, 1, 2) / 255
    expected = evaluate(make_reward(name, **kwargs), images, ["a red circle"] * 2)
    torch.testing.assert_close(rewards, expected.scores)
    assert set(expected.info) == {key for key in info["reward_components"] if not key.startswith("_")}


def test_environments_share_one_copy_of_the_weights(name, checkpoint, monkeypatch):
    make_reward(name, **checkpoint(name))
    read = []
    monkeypatch.setattr("safetensors.safe_open", lambda *a, **k: read.append(a))
    for module in ("image_reward", "hpsv2"):
        monkeypatch.setattr(f"diffusion_gym.rewards.{module}.read_weights", lambda *a, **k: read.append(a))
    assert isinstance(make_reward(name, **checkpoint(name)), VisionReward)
    assert not read


def test_it_has_a_tiny_checkpoint_and_its_pictures_traits(name):
    assert name in CHECKPOINTS and name in REWARD_SOURCES
    prompted = name in ("CLIPScore", "PickScore", "ImageReward", "HPSv2")
    assert REWARDS.fits(name, {"photo", "face", "prompt"}) and not REWARDS.fits(name, {"prompt", "shapes"})
    assert REWARDS.fits(name, {"photo", "face"}) is not prompted
    assert REWARDS.fits(name, {"photo", "prompt"}) is (name not in ("Over50", "Under30"))


@pytest.mark.slow
def test_command_prints_the_keywords(name, tmp_path, pictures):
    command = [sys.executable, "-m", "diffusion_gym.testing.random_checkpoints", name, str(tmp_path / "out")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    images, _ = pictures(1, 32, 32)
    assert evaluate(make_reward(name, **json.loads(printed.splitlines()[-1])), images, ["a cat"]).scores.isfinite()
