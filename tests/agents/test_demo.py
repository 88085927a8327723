"""The demonstration: in a smoke form here, and whole when slow tests are asked for."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from diffusion_gym.agents import demo
from diffusion_gym.agents.demo import DemoOptions, run_demo
from diffusion_gym.agents.training.settings import starting_point
from diffusion_gym.agents.training.trainer import Trainer


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The demo with fewer steps and pictures than the preset's, in a folder of its own."""

    def smaller(*given):
        settings = starting_point(*given)
        options = replace(settings.env_options, num_inference_steps=3)
        return replace(settings, env_options=options, samples_per_iteration=16, rollout_batch=16, development_every=0)

    monkeypatch.setattr(demo, "starting_point", smaller)
    monkeypatch.chdir(tmp_path)
    return lambda **options: run_demo(DemoOptions(**{"total_reward_queries": 32, "samples": 16, **options}))


def test_a_stopped_demo_goes_on_to_its_page(small, tmp_path, capsys, monkeypatch):
    """Ctrl-C after the first of two iterations; then the same command."""
    done = []
    train = Trainer._iterate

    def iterate(self, *given):
        train(self, *given)
        done.append(self.done.iteration)
        if self.done.iteration == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "_iterate", iterate)
    small()
    assert "Stopped early; the same command goes on where it stopped" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["demo-1"]
    with pytest.raises(FileExistsError, match="already holds a run"):
        small(seed=1, out=tmp_path / "runs" / "demo-1")  # another demo
    small()
    shown = capsys.readouterr().out
    assert "going on with runs/demo-1" in shown and done == [1, 2]
    result = json.loads((tmp_path / "runs" / "demo-1" / "eval.json").read_text())
    assert f"{result['base_success']:.3f}" in shown and "Report: runs/demo-1/report.html" in shown
    assert result["held_out"]["samples"] == 16
    assert (tmp_path / "runs" / "demo-1" / "report.html").stat().st_size > 10_000
    settings = replace(starting_point("DiffusionDenoise-Shapes-Location-v0", *demo.RECIPES["Shapes"], None), out=None)
    assert demo._folder(settings) == Path("runs/demo-2")  # the finished one stays as it is


@pytest.mark.parametrize("content", ["", "{}", '{"settings": {"env": 3}, "versions": {}}'])
def test_a_numbered_folder_of_something_else_is_passed_over(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "demo-1"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(content)
    settings = starting_point("DiffusionDenoise-Shapes-Location-v0", *demo.RECIPES["Shapes"], None)
    assert demo._folder(settings) == Path("runs/demo-2")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_demo_improves_strict_success(tmp_path, seed):
    run_demo(DemoOptions(out=tmp_path / "demo", seed=seed))
    result = json.loads((tmp_path / "demo" / "eval.json").read_text())
    assert result["success"] >= result["base_success"] + 0.10
    assert result["success_ci95"][0] > result["base_success_ci95"][1]
