"""The presets of the algorithms with groups do as many updates on as many steps as their authors' configurations."""

import json
from dataclasses import replace

import pytest

from diffusion_gym.agents.training.group_presets import GROUP_PRESETS
from diffusion_gym.agents.training.runs import train
from diffusion_gym.agents.training.settings import starting_point
from diffusion_gym.testing.random_xl_sd3 import write_random_sd3

# preset: agent, groups an iteration, their size, updates, trained steps of T, of which drawn for a picture
AUTHORS = {
    "flow_grpo": ("ddpo_iskl", 48, 24, 2, 9, 9),  # timestep_fraction 0.99 of 10
    "flow_grpo_fast": ("ddpo_is", 48, 24, 2, 5, 5),  # sde_window_range (0, 5), of which 3 are noisy
    "mix_grpo": ("ddpo_is", 32, 12, 4, 25, 25),  # 4 are noisy
    "grpo_guard": ("ddpo_is", 48, 24, 2, 9, 9),
    "flow_dppo": ("ddpo_is", 48, 16, 2, 5, 5),  # timestep_fraction [0, 0.5], of which 3 are noisy
    "nft": ("nft", 48, 24, 1, 9, 9),  # timestep_fraction 0.99 of 10
    "awm": ("awm", 72, 24, 1, 11, 6),  # discrete_wo_init, timestep_fraction 0.9 of 14, train_timesteps 6
    "dgpo": ("dgpo", 8, 16, 4, 5, 4),  # trunc_steps 4, num_train_timesteps 4
    "online_dpo": ("online_dpo", 8, 24, 1, 39, 39),  # timestep_fraction 0.99 of 40
}


@pytest.mark.parametrize("name", AUTHORS)
def test_updates_and_steps_are_those_of_the_authors(name):
    agent, groups, size, updates, steps, drawn = AUTHORS[name]
    values = GROUP_PRESETS[name].of(agent)
    assert list(GROUP_PRESETS[name].agents) == [agent]
    assert values["group_size"] == size and values["samples_per_iteration"] == groups * size
    assert values["samples_per_iteration"] == updates * values["batch_size"] * values["inner_epochs"]
    assert values["rollout_batch"] % size == 0
    first, last = values.get("trained_steps", (0.0, 1.0))
    total = values["num_inference_steps"]
    inside = [step for step in range(total) if first * total <= step < last * total]
    assert len(inside) == steps
    assert max(1, round(values.get("timestep_fraction", 1.0) * steps)) == drawn
    start, length = values.get("noisy_steps", (inside[0], steps))
    assert start in inside and start + length - 1 in inside


def test_every_preset_is_looked_at_and_says_where_it_is_from():
    assert set(AUTHORS) == set(GROUP_PRESETS)
    assert all(preset.source.startswith("arXiv:") or "/" in preset.source for preset in GROUP_PRESETS.values())


@pytest.fixture(scope="module")
def tiny_sd3(tmp_path_factory):
    return str(write_random_sd3(tmp_path_factory.mktemp("models") / "sd3"))


@pytest.mark.parametrize("name", AUTHORS)
def test_it_trains_a_model_of_the_authors_class(name, tiny_sd3, tmp_path):
    """One iteration with the preset, on random weights; only sizes are smaller, and the precision a CPU's."""
    agent, _, _, updates, _, _ = AUTHORS[name]
    start = starting_point("DiffusionDenoise-SD35Medium-Incompressibility-v0", agent, name, None)
    env = {"model": tiny_sd3, "prompts": ("a cat", "a dog"), "num_inference_steps": 6}
    smaller = {"group_size": 4, "batch_size": 8 if updates == 1 else 4, "lora_rank": 4, "mixed_precision": "no"}
    settings = replace(
        start,
        env_options=replace(start.env_options, **env),
        agent_options=replace(start.agent_options, **smaller),
        samples_per_iteration=8,
        rollout_batch=8,
        total_reward_queries=8,
        pictures_every=0,
        out=tmp_path / "run",
        threads=1,
    )
    train(settings)
    (row,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert row["updates"] == (1 if updates == 1 else 2) and row["updates_skipped"] == 0
    assert row["grad_norm"] > 0
    assert row["samples_dropped"] == (4 if name == "online_dpo" else 0)  # all of a group but two
