"""The demonstration: in a smoke form here, and whole when slow tests are asked for."""

import json
from dataclasses import replace

import pytest

from diffusion_gym.agents import demo
from diffusion_gym.agents.demo import DemoOptions, run_demo
from diffusion_gym.agents.training.settings import starting_point


def test_a_short_demo_writes_its_page(tmp_path, capsys, monkeypatch):
    """Of one iteration, with fewer steps and pictures than the preset's."""

    def smaller(*given):
        settings = starting_point(*given)
        options = replace(settings.env_options, num_inference_steps=3)
        return replace(settings, env_options=options, samples_per_iteration=16, rollout_batch=16)

    monkeypatch.setattr(demo, "starting_point", smaller)
    run_demo(DemoOptions(out=tmp_path / "demo", total_reward_queries=16, samples=16))
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / "demo" / "eval.json").read_text())
    assert f"{result['base_success']:.3f}" in shown and "Report:" in shown
    assert result["held_out"]["samples"] == 16
    assert (tmp_path / "demo" / "report.html").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_demo_improves_strict_success(tmp_path, seed):
    run_demo(DemoOptions(out=tmp_path / "demo", seed=seed))
    result = json.loads((tmp_path / "demo" / "eval.json").read_text())
    assert result["success"] >= result["base_success"] + 0.10
    assert result["success_ci95"][0] > result["base_success_ci95"][1]
