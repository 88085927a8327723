"""The development set: the same noises throughout, compared with the pretrained model, and no part of the training."""

import json
import math
import os
import re
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from command_line import DEVELOPED
from diffusion_gym.agents.algorithms import AGENTS
from diffusion_gym.agents.cli import main
from diffusion_gym.agents.processes import Processes
from diffusion_gym.agents.report.development import development
from diffusion_gym.agents.rollout import collect_many
from diffusion_gym.agents.training import runs
from diffusion_gym.agents.training.checkpoint import Progress
from diffusion_gym.agents.training.denoised_path import denoised_path
from diffusion_gym.agents.training.development import DevelopmentSet, Evaluation, Samples
from diffusion_gym.agents.training.schedule import Schedule
from diffusion_gym.agents.training.settings import starting_point
from diffusion_gym.agents.training.tracking import Tracker
from diffusion_gym.agents.training.trainer import Trainer
from diffusion_gym.rewards import RewardError
from run_folders import file_names, metrics_rows
from trainer_runs import BATCH, SAMPLES, Snapshot, brightness, raising, when

STEPS, NOISES = 2, 6
NO_TRACKER = Tracker()


def development_set(make_env, folder, seed=0, num_envs=3, samples=NOISES, paths=4, **keywords):
    env = make_env(num_envs, num_inference_steps=STEPS, autoreset_mode="Disabled", **keywords)
    return DevelopmentSet(env, folder, seed, samples, paths)


def followed_trainer(make_env, make_agent, out, iterations, *, reward=brightness, every=1, followed=True, **schedule):
    env = make_env(BATCH, num_inference_steps=STEPS, autoreset_mode="Disabled")
    agent = make_agent(env, scale=0.02, batch_size=4)
    schedule = {"checkpoint_every": 1, "pictures_every": 0, "development_every": every, **schedule}
    trainer = Trainer(env, agent, out, Schedule(iterations * SAMPLES, SAMPLES, **schedule))
    trainer.progress, trainer.track = False, "none"
    trainer.development = development_set(make_env, out, reward=reward) if followed else None
    return trainer


@pytest.fixture
def make_set(make_env, tmp_path):
    def make(folder="set", *given, **keywords):
        return development_set(make_env, tmp_path / folder, *given, **keywords)

    return make


@pytest.fixture
def make_trainer(make_env, make_agent, tmp_path):
    def make(iterations=4, folder="run", **keywords):
        return followed_trainer(make_env, make_agent, tmp_path / folder, iterations, **keywords)

    return make


@pytest.fixture(scope="module")
def whole(make_env, make_agent, tmp_path_factory):
    """An uninterrupted run of three iterations."""
    trainer = followed_trainer(make_env, make_agent, tmp_path_factory.mktemp("whole") / "run", 3)
    trainer.run()
    return trainer


def records(trainer):
    """The evaluations without what the clock gave."""
    lines = (trainer.out / "development.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


# --- what is measured ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_the_originals_are_the_pretrained_models(make_set, make_policy, trainable):
    """An untrained policy is the pretrained model: it makes the same pictures, and the same estimates on the way."""
    followed = make_set()
    untrained = make_policy(followed.env, trainable, scale=0.0)
    tuned = make_policy(followed.env, trainable, scale=0.3)
    found = followed.evaluate(tuned)
    expected = make_set("other").evaluate(untrained).current
    assert torch.equal(found.original.images, expected.images)
    torch.testing.assert_close(found.original.path, expected.path)
    assert not torch.equal(found.current.images, found.original.images)
    assert not torch.allclose(found.current.path[0], found.original.path[0])
    again = followed.evaluate(tuned)  # the policy is itself again after the pretrained model was sampled
    assert torch.equal(again.current.images, found.current.images)


def test_the_numbers_are_those_of_the_pictures(make_set, make_policy):
    followed = make_set()
    found = followed.evaluate(make_policy(followed.env, scale=0.3))
    for part in (found.original, found.current):
        bright = part.images.numpy().mean((1, 2, 3)) / 255  # the reward, but for the rounding of uint8
        assert np.allclose(part.rewards, bright, atol=1 / 255)
        assert part.path.shape == (STEPS + 1, 4)
        torch.testing.assert_close(part.path[-1], part.rewards[:4])
    summary = found.summary()
    before, after = (np.float64(part.rewards.numpy()) for part in (found.original, found.current))
    assert summary["reward_mean"] == pytest.approx(after.mean())
    assert summary["base_reward_mean"] == pytest.approx(before.mean())
    assert summary["difference_mean"] == pytest.approx((after - before).mean(), abs=1e-7)
    assert summary["improved"] == np.mean(after > before)
    assert summary["reward_path"] == pytest.approx(np.float64(found.current.path.numpy()).mean(1))


def test_paths_are_followed_across_batches(make_set, make_policy):
    """Sample 3 is the first of the second batch."""
    followed = make_set(paths=4)
    policy = make_policy(followed.env)
    found = followed.evaluate(policy)
    second = collect_many(followed.env, policy, 3, (0, 4, 1))
    assert torch.equal(second.images, found.current.images[3:])
    torch.testing.assert_close(found.current.path[:, 3:], denoised_path(followed.env, policy, second, 1).rewards)


def test_without_paths(make_set, make_policy):
    followed = make_set(paths=0)
    followed.track(make_policy(followed.env), Progress(1, 8), NO_TRACKER)
    row = json.loads((followed.folder / "development.jsonl").read_text())
    assert row["reward_path"] == row["base_reward_path"] == [] and row["reward_mean"] > 0
    assert [chart.title for chart in development(followed.folder)["charts"]] == ["Reward of the development set"]


def test_rewards_that_failed_are_left_out():
    nan, images = math.nan, torch.zeros(4, 8, 8, 3, dtype=torch.uint8)
    path = torch.tensor([[nan, nan], [1.0, nan]])
    original = Samples(("a",) * 4, images, torch.tensor([1.0, nan, 3.0, 5.0]), path)
    current = Samples(("a",) * 4, images, torch.tensor([2.0, 7.0, math.inf, 5.0]), path + 1)
    summary = Evaluation(original, current).summary()
    assert summary == {
        "reward_mean": pytest.approx((2 + 7 + 5) / 3),
        "base_reward_mean": 3.0,
        "difference_mean": 0.5,  # of the first and the last
        "improved": 0.5,
        "reward_path": [None, 2.0],
        "base_reward_path": [None, 1.0],
    }
    json.dumps(summary, allow_nan=False)


def test_samples_that_do_not_fill_the_batches_are_refused(make_set):
    with pytest.raises(ValueError, match="development_samples=7 must be a multiple of the environment's num_envs, 3"):
        make_set(samples=7)


# --- the noises ------------------------------------------------------------------------------------------------------


def test_the_noises_depend_on_the_seed_alone(make_set, make_policy):
    sets = [make_set("a"), make_set("b"), make_set("c", seed=1)]
    policy = make_policy(sets[0].env)
    first, same, other = (entry.evaluate(policy) for entry in sets)
    assert torch.equal(first.current.images, same.current.images) and first.current.prompts == same.current.prompts
    assert not torch.equal(first.current.images, other.current.images)
    assert len(torch.unique(first.current.images.flatten(1), dim=0)) == NOISES


def test_nothing_changes_where_nothing_is_learned(make_trainer):
    trainer = make_trainer(3)
    object.__setattr__(trainer.agent.optimizer.options, "learning_rate", 0.0)  # which no user may
    trainer.run()
    first, *others = ({**row, "iteration": 0, "reward_queries": 0} for row in records(trainer))
    assert others == [first] * 2 and first["difference_mean"] != 0


# --- within a training -----------------------------------------------------------------------------------------------


def test_what_a_training_writes(make_trainer):
    trainer = make_trainer(5, every=2)
    trainer.run()
    rows = records(trainer)
    assert [(row["iteration"], row["reward_queries"]) for row in rows] == [(2, 16), (4, 32), (5, 40)]
    assert file_names(trainer.out / "images") == [f"development-{i:06d}.png" for i in (2, 4, 5)]
    assert len({row["base_reward_mean"] for row in rows}) == 1
    assert len({row["reward_mean"] for row in rows}) == 3


def test_it_does_not_change_the_training(make_trainer, whole):
    alone = make_trainer(3, "alone", followed=False)
    alone.run()
    first, second = Snapshot.of(whole), Snapshot.of(alone)
    assert first.rows == second.rows and first.state == second.state
    assert all(torch.equal(value, second.tensors[key]) for key, value in first.tensors.items())


def test_a_resumed_run_has_the_rows_of_the_uninterrupted_one(make_trainer, whole, tmp_path):
    killed = tmp_path / "run"
    shutil.copytree(whole.out, killed)
    (killed / "checkpoints" / "iteration-000003.safetensors").unlink()  # as if killed before it was written
    rows = (killed / "development.jsonl").read_text().splitlines(keepends=True)
    assert len(rows) == 3
    (killed / "development.jsonl").write_text(rows[0] + rows[2])  # nor was the second evaluation
    calls = []

    def counted(images, prompts, metadata):
        calls.append(len(images))
        return brightness(images, prompts, metadata)

    resumed = make_trainer(3, reward=counted)
    resumed.development.go_back(2)
    assert [row["iteration"] for row in records(resumed)] == [1]
    assert "development-000003.png" not in file_names(resumed.out / "images")
    resumed.run(resume=True)
    assert records(resumed) == records(whole)
    for name in file_names(whole.out / "images"):
        assert (resumed.out / "images" / name).read_bytes() == (whole.out / "images" / name).read_bytes()
    evaluation = NOISES + 4 * (STEPS + 1)
    assert sum(calls) == 2 * evaluation  # iterations 2 and 3; the pretrained model was not sampled again


def test_other_prompts_than_those_of_the_stored_pictures_are_refused(make_set, make_policy):
    followed = make_set()
    policy = make_policy(followed.env)
    followed.evaluate(policy)
    with pytest.raises(ValueError, match="development.safetensors is of other prompts or sizes"):
        make_set(prompts=["three cyan moons"]).evaluate(policy)
    with pytest.raises(ValueError, match="is of other prompts or sizes"):
        make_set(paths=2).evaluate(policy)


def test_a_reward_that_fails_leaves_a_checkpoint_and_the_row_to_the_resumed_run(make_trainer, whole):
    calls_of_one = 2 + 2 * (STEPS + 1)
    failing = when(2 * calls_of_one + 2, raising(ConnectionError("server gone")))  # originals and one evaluation pass
    trainer = make_trainer(3, reward=failing, checkpoint_every=10)
    with pytest.raises(RewardError, match="server gone"):
        trainer.run()
    assert [row["iteration"] for row in records(trainer)] == [1]
    assert [path.stem for path in trainer.checkpoints.paths()] == ["iteration-000002"]
    resumed = make_trainer(3, checkpoint_every=10)
    resumed.run(resume=True)
    assert records(resumed) == records(whole) and metrics_rows(resumed.out) == metrics_rows(whole.out)


@pytest.mark.parametrize("call", [1, 3, 2 + 2 * (STEPS + 1) + 1], ids=["original", "its path", "current"])
def test_a_signal_ends_an_evaluation_at_its_next_batch(make_trainer, whole, capsys, call):
    """Nothing of it is written, and the resumed run catches up on it."""
    calls, terminate = [], when(call, lambda images: os.kill(os.getpid(), signal.SIGTERM))

    def counted(*given):
        calls.append(None)
        return terminate(*given)

    trainer = make_trainer(3, reward=counted, checkpoint_every=10)
    assert trainer.run() == Progress(1, trainer.schedule.samples_per_iteration)
    assert len(calls) <= call + STEPS + 1  # no more than the batch at which the signal came
    assert not (trainer.out / "development.jsonl").exists()
    assert "The development set is not evaluated now" in capsys.readouterr().out
    assert not list((trainer.out / "images").glob("development-*"))
    resumed = make_trainer(3, checkpoint_every=10)
    resumed.run(resume=True)
    assert records(resumed) == records(whole) and metrics_rows(resumed.out) == metrics_rows(whole.out)


def test_the_main_process_alone_tracks_and_its_failure_ends_all(
    make_env, make_policy, make_set, in_processes, tmp_path
):
    def train(processes):
        env = make_env(BATCH, num_inference_steps=STEPS, autoreset_mode="Disabled")
        agent = AGENTS["ddpo_is"](make_policy(env), AGENTS["ddpo_is"].Config(batch_size=4), processes)
        schedule = Schedule(2 * SAMPLES, SAMPLES, pictures_every=0, development_every=1)
        trainer = Trainer(env, agent, tmp_path / "run", schedule, progress=False, track="none")
        calls = 2 * (2 + 2 * (STEPS + 1))
        failing = when(calls + 1, raising(ConnectionError("server gone")))
        trainer.development = make_set("run", reward=failing) if processes.main else None
        try:
            trainer.run()
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    own, other = in_processes(2, train)
    assert own.startswith("RewardError") and other.startswith("PeerFailed: process 0 of 2 failed: RewardError")
    assert len((tmp_path / "run" / "development.jsonl").read_text().splitlines()) == 1
    assert file_names(tmp_path / "run" / "checkpoints") == ["iteration-000002.safetensors"]


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "interval"),
    [
        ({}, 10),
        ({"samples_per_iteration": 128}, 20),
        ({"samples_per_iteration": 6}, 427),
        ({"samples_per_iteration": 10_000}, 1),
        ({"development_samples": 16}, 3),
        ({"total_reward_queries": 3_584}, 0),  # 14 iterations of 256; 15 are 60 pictures for each sample
        ({"total_reward_queries": 3_585}, 10),
        ({"development_every": 0}, 0),
        ({"development_every": 1, "total_reward_queries": 8}, 1),
    ],
)
def test_the_default_interval(options, interval):
    assert Schedule(**options).development_interval == interval


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [("development_every", -1, 0), ("development_samples", 0, 1), ("development_paths", -1, 0)],
)
def test_options_out_of_range(name, value, least):
    with pytest.raises(ValueError, match=f"{name}={value} must be at least {least}"):
        Schedule(**{name: value})


@pytest.mark.parametrize(("samples", "batch"), [(64, 16), (30, 15), (17, 1), (5, 5)])
def test_a_run_has_a_set_of_any_size_in_its_main_process(tiny_pipeline, tmp_path, samples, batch):
    settings = starting_point("DiffusionDenoise-v0", "ddpo_is", None, str(tiny_pipeline))
    env = replace(settings.env_options, reward="Compressibility", prompts=("a red circle",))
    settings = replace(settings, out=tmp_path, env_options=env, development_samples=samples, seed=5)
    followed = runs._development(settings, Processes())
    assert (followed.env.num_envs, followed.samples, followed.paths, followed.seed) == (batch, samples, 16, 5)
    assert runs._development(settings, Processes(1, 2, torch.device("cpu"))) is None
    assert runs._development(replace(settings, development_every=0), Processes()) is None


def test_the_command_line(tiny_pipeline, tmp_path, capsys):
    out = tmp_path / "run"
    options = {**DEVELOPED, "--env.model": tiny_pipeline, "--out": out}
    arguments = [str(part) for pair in options.items() for part in pair]
    main(["train", "--env.prompts", "a red circle", "<b>two</b> stars", *arguments])
    assert file_names(out / "images") == [f"{kind}-{i:06d}.png" for kind in ("development",) for i in (1, 2)] + [
        f"iteration-{i:06d}.png" for i in (0, 2)
    ]
    assert "tensorboard" not in file_names(out)
    main(["train", "--resume", "--out", str(out), "--total-reward-queries", "12", "--development-every", "0"])
    assert len((out / "development.jsonl").read_text().splitlines()) == 2
    main(["report", str(out)])
    text = (out / "report.html").read_text()
    assert "Development set" in text and "Reward along the trajectory" in text and "At iteration 2" in text
    prompts = re.findall(r'alt="Before: ([^"]*)"', text)
    assert len(prompts) == 4 and set(prompts) <= {"a red circle", "&lt;b&gt;two&lt;/b&gt; stars"}
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["train", "--help-all"])
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in ("development-every", "development-samples", "development-paths"))
    assert "--track {tensorboard,wandb,none}" in shown


# --- what is shown ---------------------------------------------------------------------------------------------------


def test_the_table_is_that_of_the_thesis(make_set, make_policy):
    followed = make_set(paths=2)
    found = followed.evaluate(make_policy(followed.env, scale=0.3))
    rows = list(found.rows())
    assert len(rows) == NOISES
    for index, (original, current, before, after, difference, prompt, curve) in enumerate(rows):
        assert np.array_equal(original, found.original.images[index]) and prompt == found.current.prompts[index]
        assert np.array_equal(current, found.current.images[index])
        assert difference == pytest.approx(after - before, abs=1e-6)
        assert (curve is not None) == (index < 2)
    assert rows[0][-1].dtype == np.uint8 and rows[0][-1].shape[2] == 3
    assert not np.array_equal(rows[0][-1], rows[1][-1])  # each has its own curve


def test_the_report_survives_rewards_that_failed(tmp_path):
    assert development(tmp_path) is None  # a run without a set
    row = {"iteration": 1, "reward_queries": 8, "reward_mean": None, "base_reward_mean": None, "improved": None}
    row |= {"difference_mean": None, "reward_path": [], "base_reward_path": []}
    (tmp_path / "development.jsonl").write_text(json.dumps(row) + "\n")
    (chart,) = development(tmp_path)["charts"]
    assert not chart.svg and "nan" not in chart.spoken
