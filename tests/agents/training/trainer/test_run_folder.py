"""What a training writes, and what its schedule must be."""

import math
from dataclasses import replace

import pytest
import torch

from diffusion_gym.agents.algorithms import AGENTS
from diffusion_gym.agents.training.checkpoint import Progress
from diffusion_gym.agents.training.trainer import Schedule, Trainer, read_metrics
from run_folders import file_names, metrics_rows
from trainer_runs import BATCH, SAMPLES, assert_equals


def test_the_run_folder(make_trainer):
    trainer = make_trainer(3, pictures=True, pictures_every=2)
    assert trainer.run() == Progress(3, 24)
    assert file_names(trainer.out) == ["checkpoints", "images", "metrics.jsonl", "tensorboard"]
    assert file_names(trainer.out / "checkpoints") == ["iteration-000002.safetensors", "iteration-000003.safetensors"]
    assert file_names(trainer.out / "images") == [f"iteration-{i:06d}.png" for i in (0, 2, 3)]
    assert any(name.startswith("events.out.tfevents") for name in file_names(trainer.out / "tensorboard"))


def test_the_metrics(make_trainer):
    trainer = make_trainer(3)
    trainer.run()
    records = read_metrics(trainer.out / "metrics.jsonl")
    assert [record["iteration"] for record in records] == [1, 2, 3]
    assert [record["reward_queries"] for record in records] == [8, 16, 24]
    expected = {"iteration", "reward_queries", "reward_mean", "reward_std", "red_mean", "seconds", "rollout_seconds"}
    expected |= {"images_per_second", "loss", "clip_fraction", "approx_kl", "grad_norm", "learning_rate"}
    expected |= {"updates", "updates_skipped", "samples_dropped"}
    for record in records:
        assert record.keys() == expected
        assert all(math.isfinite(value) for value in record.values())
        assert 0 < record["rollout_seconds"] <= record["seconds"]
        assert record["updates"] == 4


def test_the_reward_in_the_metrics_is_that_of_the_pictures(make_trainer):
    seen = []

    def recorded(images, prompts, metadata):
        scores = images.mean((1, 2, 3))
        seen.append(scores.clone())
        if len(seen) == 3:
            scores[1] = float("nan")
            seen[-1] = scores
        return scores

    trainer = make_trainer(2, reward=recorded)
    trainer.run()
    for row, scores in zip(metrics_rows(trainer.out), torch.cat(seen).view(2, SAMPLES), strict=True):
        scores = scores[scores.isfinite()].double()
        assert row["reward_mean"] == pytest.approx(scores.mean().item(), rel=1e-6)
        assert row["reward_std"] == pytest.approx(scores.std(correction=0).item(), rel=1e-4)
        assert row["samples_dropped"] == SAMPLES - len(scores)


def test_pictures_do_not_change_the_run(make_trainer, uninterrupted):
    trainer = make_trainer(2, pictures=True, pictures_every=1)
    trainer.run()
    assert metrics_rows(trainer.out) == uninterrupted().rows[:2]


def test_the_seed_decides(make_trainer, uninterrupted):
    again, other = make_trainer(folder="again"), make_trainer(1, "other", seed=1)
    again.run()
    other.run()
    assert_equals(again, uninterrupted())
    assert metrics_rows(other.out)[0]["reward_mean"] != metrics_rows(again.out)[0]["reward_mean"]


def test_every_iteration_samples_anew(make_trainer):
    trainer = make_trainer(3)
    # The same policy throughout: only the noise can differ. No user may ask for that.
    object.__setattr__(trainer.agent.optimizer.options, "learning_rate", 0.0)
    trainer.run()
    assert len({row["reward_mean"] for row in metrics_rows(trainer.out)}) == 3


def test_checkpoints_come_in_their_rhythm_and_at_the_end(make_trainer):
    trainer = make_trainer(3, checkpoint_every=2)
    trainer.run()
    assert file_names(trainer.out / "checkpoints") == ["iteration-000002.safetensors", "iteration-000003.safetensors"]


@pytest.mark.parametrize(
    "name", ["total_reward_queries", "samples_per_iteration", "checkpoint_every", "keep_checkpoints"]
)
def test_a_schedule_out_of_range_is_named(name):
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        Schedule(**{name: 0})


def test_samples_that_do_not_fill_the_rollouts_are_refused(make_env, make_agent, tmp_path):
    env = make_env(BATCH)
    with pytest.raises(
        ValueError, match="samples_per_iteration=6 must be a multiple of the rollout's batch, num_envs=4"
    ):
        Trainer(env, make_agent(env), tmp_path, Schedule(samples_per_iteration=6))


@pytest.mark.parametrize("name", ["ddpo_is", "dpok"])
def test_groups_that_do_not_fit_the_rollouts_are_refused_before_anything_is_written(
    make_env, make_agent, tmp_path, name
):
    env, out = make_env(BATCH), tmp_path / "run"
    agent = make_agent(env, agent=AGENTS[name], group_size=3)
    with pytest.raises(ValueError, match="group_size=3 must divide the rollout's batch, num_envs=4"):
        Trainer(env, agent, out, Schedule(samples_per_iteration=SAMPLES))
    assert not out.exists()


@pytest.mark.parametrize("asked, planned", [(1, 8), (8, 8), (9, 16)])
def test_reward_queries_are_rounded_up_to_whole_iterations(asked, planned):
    assert Schedule(total_reward_queries=asked, samples_per_iteration=8).planned_reward_queries == planned


@pytest.mark.parametrize("asked, said", [(8, ""), (5, "total_reward_queries=5 is rounded up to 8, whole iterations")])
def test_a_budget_that_is_rounded_up_is_said_so(make_trainer, capsys, asked, said):
    trainer = make_trainer(1)
    trainer.schedule, trainer.progress = replace(trainer.schedule, total_reward_queries=asked), True
    assert trainer.run() == Progress(1, 8)
    shown = capsys.readouterr().out
    assert shown.startswith(said) and bool(shown) is bool(said)
