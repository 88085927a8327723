"""Every example runs, in a smoke form."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from diffusion_gym.prompts import make_prompts

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name, *arguments):
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_tested_here():
    text = Path(__file__).read_text()
    assert all(f'"{path.name}"' in text for path in EXAMPLES.glob("*.py"))


def test_custom_reward(tmp_path):
    out = tmp_path / "run"
    run("custom_reward.py", "--queries", 16, "--batch", 8, "--out", out)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert abs(rows[0]["reward_mean"] - (rows[0]["red_mean"] - rows[0]["blue_mean"])) < 1e-6


def test_custom_agent(tmp_path):
    """Shorter than it is: its own options come last and win."""
    out = tmp_path / "run"
    sizes = ["--total-reward-queries", 8, "--samples-per-iteration", 4, "--rollout-batch", 4]
    shown = run("custom_agent.py", *sizes, "--env.num-inference-steps", 3, "--agent.group-size", 2, "--out", out)
    assert shown.startswith("custom_agent:RLOO on DiffusionDenoise-Shapes-Location, preset shapes-demo")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["reward_queries"] for row in rows] == [4, 8]
    assert json.loads((out / "config.json").read_text())["settings"]["agent_options"]["group_size"] == 2


def test_step_an_environment(tmp_path):
    shown = run("step_an_environment.py", "--out", tmp_path / "process.png")
    assert "'a red star left of a blue circle': reward" in shown
    assert (tmp_path / "process.png").stat().st_size > 1000


def test_sb3_ddpo(tmp_path):
    pytest.importorskip("stable_baselines3")
    shown = run("sb3_ddpo.py", "--iterations", 1, "--num-envs", 4, "--steps", 3, "--out", tmp_path)
    assert (
        re.search(r"mean reward \d\.\d+ before, \d\.\d+ after", shown)
        and "StableDiffusionPipeline.from_pretrained(" in shown
    )
    assert (tmp_path / "policy.safetensors").exists() and list((tmp_path / "logs").rglob("events.*"))


def test_tianshou_ddpo(tmp_path):
    pytest.importorskip("tianshou")
    shown = run("tianshou_ddpo.py", "--iterations", 2, "--num-envs", 4, "--steps", 3, "--out", tmp_path)
    assert re.search(r"Epoch #2: test_reward: +\d\.\d+", shown) and "pipe.load_lora_weights(" in shown
    assert (tmp_path / "best.safetensors").exists() and list((tmp_path / "logs").rglob("events.*"))


def numbers(shown):
    """The `name=number` of each line."""
    found = [dict(re.findall(r"(\w+)=([\d.e+-]+)", line)) for line in shown.splitlines() if "=" in line]
    return [{key: float(value) for key, value in row.items()} for row in found]


def test_cleanrl_style_ppo(tmp_path):
    path = EXAMPLES / "cleanrl_style_ppo.py"
    assert len(path.read_text().splitlines()) <= 200
    sizes = ["--num-envs", 4, "--num-episodes", 2, "--num-inference-steps", 3, "--total-reward-queries", 16]
    rows = numbers(run(path.name, *sizes, "--log-dir", tmp_path / "logs", "--save-dir", tmp_path / "model"))
    assert [row["reward_queries"] for row in rows] == [8, 16]
    for row in rows:
        assert row["first_ratio_error"] <= 1e-6  # before the first update of an iteration
        assert row["approx_kl"] > 1e-9  # after it
        assert row["reward"] * 8 == round(row["reward"] * 8)  # strict success of 8 pictures
    assert list((tmp_path / "logs").glob("events.*")) and (tmp_path / "model" / "model_index.json").exists()

    spec = importlib.util.spec_from_file_location("cleanrl_style_ppo", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    history = module.defaultdict(list)
    first = module.normalize(np.array([0.0, 2.0, np.nan]), ["a", "b", "a"], history)
    np.testing.assert_allclose(first, [-1, 1, 0])  # by the batch: no prompt has 16 rewards yet
    easy = np.array([9.0, 11.0] * 8)
    np.testing.assert_allclose(module.normalize(easy, ["c"] * 16, history), [-1, 1] * 8)
    mixed = module.normalize(np.array([10.0, 0.0]), ["c", "b"], history)
    np.testing.assert_allclose(mixed, [0, -1], atol=1e-12)  # c by its own mean of 10, b by the batch's of 5


def test_torchrl_rollout():
    pytest.importorskip("torchrl")
    pytest.importorskip("tensordict")
    sizes = ["--num-envs", 8, "--num-inference-steps", 4, "--iterations", 2, "--updates", 2]
    shown = run("torchrl_rollout.py", *sizes)
    assert [row["iteration"] for row in numbers(shown)] == [1, 2]
    for row in numbers(shown):
        assert 0.95 < row["noise"] < 1.05  # of 8,192 numbers; with the mean as the action it would be 0
    ratios = np.array(re.findall(r"max_ratio=([\d.]+),([\d.]+)", shown), dtype=float)
    assert abs(ratios[:, 0] - 1).max() <= 2e-6 and abs(ratios[:, 1] - 1).max() > 1e-4


def test_sd14_on_a_gpu(tmp_path, tiny_pipeline):
    sizes = ["--queries", 16, "--samples", 8, "--batch", 4, "--steps", 3, "--model", tiny_pipeline]
    shown = run("sd14_on_a_gpu.py", *sizes, "--out", tmp_path)
    assert shown.startswith("2 iterations;") and f"pipe.load_lora_weights('{tmp_path / 'lora'}')" in shown
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["reward_queries"] for row in rows] == [8, 16] and [row["updates"] for row in rows] == [4, 4]
    assert all(row["reward_mean"] == -row["jpeg_kb_mean"] < 0 for row in rows)
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").exists()


def test_sd14_on_a_gpu_takes_the_papers_prompts():
    spec = importlib.util.spec_from_file_location("sd14_on_a_gpu", EXAMPLES / "sd14_on_a_gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sizes = {reward: len(make_prompts(name).prompts) for reward, name in module.PROMPTS.items()}
    assert sizes == {"Compressibility": 398, "Incompressibility": 398, "Aesthetic": 45}
