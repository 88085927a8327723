"""The picture of the README: learning curve, prompts and marks are those of the run."""

import io
import json

import pytest
import torch
from PIL import Image

from diffusion_gym.agents.training.pictures import save_grid
from tools.pages.demo import summary_picture


@pytest.fixture
def run(tmp_path):
    """A run folder with an evaluation of 16 pictures, of which every second one is a success after training."""
    part = {"samples": 16, "reward_mean": 0.5, "base_reward_mean": 0.0, "kl_to_base": 1.0, "prompts": {}}
    part |= {"success": 0.5, "base_success": 0.0}
    part |= {f"{key}_ci95": [0.0, 1.0] for key in ("reward", "base_reward", "success", "base_success")}
    pictures = [
        {"prompt": "a red star", "reward": place % 2, "base_reward": 0.0, "success": place % 2, "base_success": 0.0}
        for place in range(16)
    ]
    about = {"env": "x", "agent": "ddpo_is", "seed": 1, "iteration": 2, "reward_queries": 32}
    evaluation = {**about, **part, "shown": {"size": [8, 8], "pictures": pictures}}
    (tmp_path / "eval.json").write_text(json.dumps(evaluation))
    rows = [
        {"iteration": index, "reward_queries": 16 * index, "reward_mean": 0.2, "success_mean": 0.2, "seconds": 1.0}
        for index in (1, 2)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("before", "after"):
        save_grid(tmp_path / "images" / f"{name}.png", torch.zeros(16, 8, 8, 3, dtype=torch.uint8), columns=4)
    return tmp_path


def colors(data):
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    return picture.size, {color: count for count, color in picture.getcolors(maxcolors=10**6)}


def test_successes_are_marked_and_the_curve_is_drawn(run):
    size, found = colors(summary_picture(run))
    assert size[0] <= 1200
    green, red, blue = (found.get(color, 0) for color in ((11, 107, 58), (176, 32, 32), (31, 95, 196)))
    assert red == pytest.approx(3 * green, rel=0.2) and blue > 50  # 4 of the 16 pictures are successes


def test_a_run_without_an_evaluation_is_refused(run):
    (run / "eval.json").unlink()
    with pytest.raises(ValueError, match="has no evaluation with strict success; run diffusion-gym eval"):
        summary_picture(run)
