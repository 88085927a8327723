"""Every example runs, in a smoke form: in this process, which has the libraries already, but for those of several."""

import contextlib
import importlib.util
import io
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from chat_server import ChatServer
from diffusion_gym.agents.benchmark import command
from diffusion_gym.agents.benchmark.cells import run_cell
from diffusion_gym.prompts import make_prompts
from diffusion_gym.testing.random_vlm import write_random_bert

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NAMES = sorted(path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb"))


@pytest.fixture
def run(monkeypatch, capfd):
    """`run(name, *arguments)`: what the script prints, which ends without an error."""

    def start(name, *arguments):
        path = EXAMPLES / name
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])  # as Python does for a script
        capfd.readouterr()
        runpy.run_path(str(path), run_name="__main__")
        return capfd.readouterr().out

    yield start
    sys.modules.pop("custom_agent", None)  # which imports itself by name


def loaded(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def numbers(shown):
    """The `name=number` of each line."""
    found = [dict(re.findall(r"(\w+)=([\d.e+-]+)", line)) for line in shown.splitlines() if "=" in line]
    return [{key: float(value) for key, value in row.items()} for row in found]


def test_every_example_is_tested_here():
    assert all(f'"{name}"' in Path(__file__).read_text() for name in NAMES if name.endswith(".py"))


def test_every_example_has_its_line_and_every_line_its_example():
    text = (EXAMPLES / "README.md").read_text()
    rows = re.findall(r"^\| \[`(.+?)`\]\((.+?)\) \|", text, flags=re.M)
    listed = [shown for shown, linked in rows if shown == linked]
    assert len(listed) == len(set(listed))
    assert set(NAMES) <= set(listed) <= {*NAMES, "quickstart.ipynb"}
    assert set(re.findall(r"examples/(\w+\.py)", text)) <= set(NAMES)


def test_custom_reward(run, tmp_path):
    run("custom_reward.py", "--queries", 16, "--batch", 8, "--out", tmp_path)
    rows = metrics(tmp_path)
    assert len(rows) == 2
    assert abs(rows[0]["reward_mean"] - (rows[0]["red_mean"] - rows[0]["blue_mean"])) < 1e-6


def test_background_probe(run, tmp_path):
    out = tmp_path / "run"
    sizes = ["--total-reward-queries", 4, "--samples-per-iteration", 4, "--rollout-batch", 4]
    run("custom_agent.py", *sizes, "--env.num-inference-steps", 3, "--agent.group-size", 2, "--out", out)
    shown = run("background_probe.py", out, "--samples", 4)
    before, after = map(float, re.search(r"background (\d\.\d+) -> (\d\.\d+) \(change", shown).groups())
    assert json.loads((out / "eval.json").read_text())["probe"]["mean"] == pytest.approx(after, abs=1e-3)
    assert 0 < before < 1
    images = np.zeros((1, 3, 8, 8), np.float32)
    images[:, :, :, 1:-1] = 0.25  # the upper and the lower edge, but for the corners
    assert loaded("background_probe").lightness(torch.from_numpy(images), ["a"], [{}]).tolist() == [0.125]


def test_custom_agent(run, tmp_path):
    """Shorter than it is: its own options come last and win."""
    out = tmp_path / "run"
    sizes = ["--total-reward-queries", 8, "--samples-per-iteration", 4, "--rollout-batch", 4]
    shown = run("custom_agent.py", *sizes, "--env.num-inference-steps", 3, "--agent.group-size", 2, "--out", out)
    assert shown.startswith("custom_agent:RLOO on DiffusionDenoise-Shapes-Location-v0, preset shapes-demo")
    assert [row["reward_queries"] for row in metrics(out)] == [4, 8]
    assert json.loads((out / "config.json").read_text())["settings"]["agent_options"]["group_size"] == 2


def test_custom_model(run, tmp_path):
    shown = run("custom_model.py", "--pretraining", 40, "--queries", 96, "--batch", 16, "--out", tmp_path)
    before, after = map(float, re.search(r"mean reward (\d\.\d+) before, (\d\.\d+) after", shown).groups())
    assert after > before + 0.01  # of 32 pictures from the same noise
    assert [row["reward_queries"] for row in metrics(tmp_path)] == [16, 32, 48, 64, 80, 96]


def test_native_training(run, tmp_path):
    sizes = ["--batch", 4, "--steps", 3, "--samples", 8, "--out", tmp_path]
    shown = run("native_training.py", "--queries", 4, *sizes)
    assert "1 iterations, 4 reward queries" in shown
    for kind in ("training", "held-out"):
        assert f"{kind} prompts, 8 samples of each model from the same noise:" in shown
    assert "StableDiffusionPipeline.from_pretrained(" in shown and (tmp_path / "model" / "model_index.json").exists()
    assert (tmp_path / "images" / "before.png").exists()
    first = metrics(tmp_path)
    assert "2 iterations, 8 reward queries" in run("native_training.py", "--queries", 8, "--resume", *sizes)
    assert metrics(tmp_path)[:1] == first and len(metrics(tmp_path)) == 2


def test_run_benchmark(tmp_path, monkeypatch):
    """Smaller, and its trainings in this process; tests/agents/benchmark/ has them in their own."""

    def in_this_process(cells, jobs, told):
        for cell in cells:
            told(cell, run_cell(cell))

    monkeypatch.setattr(command, "run_local", in_this_process)
    out, example = tmp_path / "bench", loaded("run_benchmark")
    example.SUITE = example.SUITE.replace("= 32", "= 8").replace("= 16", "= 8").replace("steps = 5", "steps = 2")
    line = ["run_benchmark.py", "--seeds", "1", "--budget", "8", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit) as ended:
        example.main()
    assert not ended.value.code
    assert len(list((out / "records").iterdir())) == 2
    agents = json.loads((out / "summary.json").read_text())["agents"]
    assert {name: agent["runs"] for name, agent in agents.items()} == {"ddpo_is": 1, "ddpo_is_batch": 1}
    assert "ddpo_is_batch" in (out / "report.html").read_text()


def test_step_an_environment(run, tmp_path):
    shown = run("step_an_environment.py", "--out", tmp_path / "process.png")
    assert "'a red star left of a blue circle': reward" in shown
    assert (tmp_path / "process.png").stat().st_size > 1000


def test_sb3_ddpo(run, tmp_path):
    pytest.importorskip("stable_baselines3")
    shown = run("sb3_ddpo.py", "--iterations", 1, "--num-envs", 4, "--steps", 3, "--out", tmp_path)
    assert re.search(r"mean reward \d\.\d+ before, \d\.\d+ after", shown)
    assert "StableDiffusionPipeline.from_pretrained(" in shown
    assert (tmp_path / "policy.safetensors").exists() and list((tmp_path / "logs").rglob("events.*"))


def test_tianshou_ddpo(run, tmp_path):
    pytest.importorskip("tianshou")
    shown = run("tianshou_ddpo.py", "--iterations", 2, "--num-envs", 4, "--steps", 3, "--out", tmp_path)
    assert re.search(r"best mean reward \d\.\d+", shown) and "pipe.load_lora_weights(" in shown
    assert (tmp_path / "best.safetensors").exists() and list((tmp_path / "logs").rglob("events.*"))


def test_cleanrl_style_ppo(run, tmp_path):
    assert len((EXAMPLES / "cleanrl_style_ppo.py").read_text().splitlines()) <= 200
    sizes = ["--num-envs", 4, "--num-episodes", 2, "--num-inference-steps", 3, "--total-reward-queries", 16]
    rows = numbers(
        run("cleanrl_style_ppo.py", *sizes, "--log-dir", tmp_path / "logs", "--save-dir", tmp_path / "model")
    )
    assert [row["reward_queries"] for row in rows] == [8, 16]
    for row in rows:
        assert row["first_ratio_error"] <= 1e-6  # before the first update of an iteration
        assert row["approx_kl"] > 1e-9  # after it
        assert row["reward"] * 8 == round(row["reward"] * 8)  # strict success of 8 pictures
    assert list((tmp_path / "logs").glob("events.*")) and (tmp_path / "model" / "model_index.json").exists()


def test_cleanrl_style_ppo_normalizes_by_prompt():
    module = loaded("cleanrl_style_ppo")
    history = module.defaultdict(list)
    first = module.normalize(np.array([0.0, 2.0, np.nan]), ["a", "b", "a"], history)
    np.testing.assert_allclose(first, [-1, 1, 0])  # by the batch: no prompt has 16 rewards yet
    easy = np.array([9.0, 11.0] * 8)
    np.testing.assert_allclose(module.normalize(easy, ["c"] * 16, history), [-1, 1] * 8)
    mixed = module.normalize(np.array([10.0, 0.0]), ["c", "b"], history)
    np.testing.assert_allclose(mixed, [0, -1], atol=1e-12)  # c by its own mean of 10, b by the batch's of 5


def test_torchrl_rollout(run):
    pytest.importorskip("torchrl")
    pytest.importorskip("tensordict")
    sizes = ["--num-envs", 8, "--num-inference-steps", 4, "--iterations", 2, "--updates", 2]
    shown = run("torchrl_rollout.py", *sizes)
    assert [row["iteration"] for row in numbers(shown)] == [1, 2]
    for row in numbers(shown):
        assert 0.95 < row["noise"] < 1.05  # of 8,192 numbers; with the mean as the action it would be 0
    ratios = np.array(re.findall(r"max_ratio=([\d.]+),([\d.]+)", shown), dtype=float)
    assert abs(ratios[:, 0] - 1).max() <= 2e-6 and abs(ratios[:, 1] - 1).max() > 1e-4


def test_sd14_on_a_gpu(run, tmp_path, tiny_pipeline):
    sizes = ["--queries", 16, "--samples", 8, "--batch", 4, "--steps", 3, "--model", tiny_pipeline]
    shown = run("sd14_on_a_gpu.py", *sizes, "--out", tmp_path)
    assert shown.startswith("2 iterations;") and f"pipe.load_lora_weights('{tmp_path / 'lora'}', " in shown
    rows = metrics(tmp_path)
    assert [row["reward_queries"] for row in rows] == [8, 16] and [row["updates"] for row in rows] == [4, 4]
    assert all(row["reward_mean"] == -row["jpeg_kb_mean"] < 0 for row in rows)
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").exists()


def test_sd14_on_a_gpu_takes_the_papers_prompts():
    sizes = {reward: len(make_prompts(name).prompts) for reward, name in loaded("sd14_on_a_gpu").PROMPTS.items()}
    assert sizes == {"Compressibility": 398, "Incompressibility": 398, "Aesthetic": 45}


@pytest.fixture
def wolves():
    """A chat-completions server that sees three wolves everywhere."""
    server = ChatServer()
    server.reply = lambda number, body: server.completion("three wolves")
    yield server
    server.close()


def test_vlm_reward(run, wolves, tmp_path, tiny_pipeline):
    sizes = ["--queries", 8, "--samples", 8, "--batch", 4, "--steps", 3, "--model", tiny_pipeline]
    bert = ["--bertscore-model", write_random_bert(tmp_path / "bert"), "--bertscore-layers", 2]
    shown = run("vlm_reward.py", "--server", wolves.url, *sizes, *bert, "--out", tmp_path / "run")
    assert shown.startswith("1 iterations; the model's last words: 'three wolves'")
    (row,) = metrics(tmp_path / "run")
    assert row["reward_mean"] == row["recall_mean"] != 0
    asked = [request["body"] for request in wolves.requests]
    questions = [part["text"] for body in asked for part in body["messages"][0]["content"] if part["type"] == "text"]
    assert questions == ["what is happening in this image?"] * 8 and {body["model"] for body in asked} == {"first"}


def test_multi_gpu(in_processes, tmp_path):
    """Two gloo processes on the CPU; tests/agents/scale_out/ compares such runs with one process."""

    def child(processes):
        sys.argv = ["multi_gpu.py", *"--queries 16 --samples 8 --batch 4 --steps 3 --out".split(), str(tmp_path)]
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            runpy.run_path(str(EXAMPLES / "multi_gpu.py"), run_name="__main__")
        return shown.getvalue()

    main_one, other = in_processes(2, child)
    assert "2 iterations by 2 processes on cpu" in main_one and other == ""
    assert [row["reward_queries"] for row in metrics(tmp_path)] == [8, 16]
    assert (tmp_path / "model" / "model_index.json").exists()
