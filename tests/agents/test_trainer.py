"""The training loop: what it writes, and that no interruption changes the result."""

import errno
import json
import math
import os
import signal
import threading
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch

from diffusion_gym.agents.algorithms import NoUsableReward
from diffusion_gym.agents.checkpoint import Checkpoints, Progress
from diffusion_gym.agents.trainer import Schedule, Trainer, read_metrics
from diffusion_gym.rewards import RewardError, RewardOutput
from diffusion_gym.storage import save_tensors

BATCH, SAMPLES = 4, 8
CLOCKS = {"seconds", "rollout_seconds", "images_per_second"}


def brightness(images, prompts, metadata):
    scores = images.mean((1, 2, 3))
    return RewardOutput(scores, {"red": images[:, 0].mean((1, 2))})


def when(call, act, reward=brightness):
    """A reward that at its n-th call does something else, once."""
    calls = []

    def scored(images, prompts, metadata):
        calls.append(None)
        if len(calls) == call:
            changed = act(images)
            if changed is not None:
                return changed
        return reward(images, prompts, metadata)

    return scored


def raising(error):
    def act(images):
        raise error

    return act


def interrupt(images):
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def build(make_env, make_agent):
    """`build(out, iterations, reward, ...)`: every call builds all anew, as a new process would."""

    def make(out, iterations=4, *, reward=brightness, trainable="lora", pictures=False, seed=0, init=0, **schedule):
        env = make_env(BATCH, num_inference_steps=3, reward=reward, autoreset_mode="Disabled")
        # batches of 4 of 8 samples, two passes: the order of the samples and Adam's memory both matter
        agent = make_agent(
            env, trainable, scale=0.02, batch_size=4, inner_epochs=2, normalization="prompt", statistics_min_count=2
        )
        if init:  # other weights than those of the run: a resumed run must not depend on them
            generator = torch.Generator().manual_seed(init)
            with torch.no_grad():
                for parameter in agent.parameters:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        schedule = {"checkpoint_every": 1, "pictures_every": 0, **schedule}
        return Trainer(
            env,
            agent,
            out,
            Schedule(total_reward_queries=iterations * SAMPLES, samples_per_iteration=SAMPLES, **schedule),
            seed=seed,
            pictures_env=make_env(4, num_inference_steps=3) if pictures else None,
            progress=False,
        )

    return make


@pytest.fixture
def make_trainer(build, tmp_path):
    """`make_trainer(iterations, folder, ...)`: a trainer with its run folder in this test's own folder."""

    def make(iterations=4, folder="run", **options):
        return build(tmp_path / folder, iterations, **options)

    return make


@dataclass(frozen=True)
class Snapshot:
    """All that a run left: metrics without clocks, weights, Adam, statistics, progress."""

    rows: list
    tensors: dict
    state: dict
    done: Progress

    @staticmethod
    def of(trainer):
        tensors = {key: value.clone() for key, value in trainer.agent.tensors().items()}
        return Snapshot(rows(trainer), tensors, trainer.agent.state(), trainer.done)


@pytest.fixture(scope="module")
def uninterrupted(build, tmp_path_factory):
    """`uninterrupted(trainable)`: the snapshot of a run of 4 iterations."""

    @cache
    def finished(trainable="lora"):
        trainer = build(tmp_path_factory.mktemp("uninterrupted"), trainable=trainable)
        trainer.run()
        return Snapshot.of(trainer)

    return finished


def rows(trainer):
    lines = (trainer.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in CLOCKS} for line in lines]


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def same_agent(first, second):
    """Whether two snapshots hold the same agent, bit for bit."""
    a, b = first.tensors, second.tensors
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) and first.state == second.state


def assert_equals(trainer, whole):
    found = Snapshot.of(trainer)
    assert found.rows == whole.rows
    assert same_agent(found, whole)
    assert found.done == whole.done == Progress(4, 4 * SAMPLES)


# --- what a run writes -----------------------------------------------------------------------------------------


def test_the_run_folder(make_trainer):
    trainer = make_trainer(3, pictures=True, pictures_every=2)
    assert trainer.run() == Progress(3, 24)
    assert names(trainer.out) == ["checkpoints", "images", "metrics.jsonl", "tensorboard"]
    assert names(trainer.out / "checkpoints") == ["iteration-000002.safetensors", "iteration-000003.safetensors"]
    assert names(trainer.out / "images") == [f"iteration-{i:06d}.png" for i in (0, 2, 3)]
    assert any(name.startswith("events.out.tfevents") for name in names(trainer.out / "tensorboard"))


def test_the_metrics(make_trainer):
    trainer = make_trainer(3)
    trainer.run()
    records = read_metrics(trainer.out / "metrics.jsonl")
    assert [record["iteration"] for record in records] == [1, 2, 3]
    assert [record["reward_queries"] for record in records] == [8, 16, 24]
    expected = {"iteration", "reward_queries", "reward_mean", "reward_std", "red_mean", "seconds", "rollout_seconds"}
    expected |= {"images_per_second", "loss", "clip_fraction", "approx_kl", "grad_norm", "learning_rate"}
    expected |= {"updates", "samples_dropped"}
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
    for row, scores in zip(rows(trainer), torch.cat(seen).view(2, SAMPLES), strict=True):
        scores = scores[scores.isfinite()].double()
        assert row["reward_mean"] == pytest.approx(scores.mean().item(), rel=1e-6)
        assert row["reward_std"] == pytest.approx(scores.std(correction=0).item(), rel=1e-4)
        assert row["samples_dropped"] == SAMPLES - len(scores)


def test_pictures_do_not_change_the_run(make_trainer, uninterrupted):
    trainer = make_trainer(2, pictures=True, pictures_every=1)
    trainer.run()
    assert rows(trainer) == uninterrupted().rows[:2]


def test_the_seed_decides(make_trainer, uninterrupted):
    again, other = make_trainer(folder="again"), make_trainer(1, "other", seed=1)
    again.run()
    other.run()
    assert_equals(again, uninterrupted())
    assert rows(other)[0]["reward_mean"] != rows(again)[0]["reward_mean"]


def test_every_iteration_samples_anew(make_trainer):
    trainer = make_trainer(3)
    trainer.agent.optimizer.options = replace(
        trainer.agent.optimizer.options, learning_rate=0.0
    )  # the same policy throughout: only the noise can differ
    trainer.run()
    assert len({row["reward_mean"] for row in rows(trainer)}) == 3


def test_checkpoints_come_in_their_rhythm_and_at_the_end(make_trainer):
    trainer = make_trainer(3, checkpoint_every=2)
    trainer.run()
    assert names(trainer.out / "checkpoints") == ["iteration-000002.safetensors", "iteration-000003.safetensors"]


@pytest.mark.parametrize("keep, expected", [(1, [12]), (3, [10, 11, 12]), (20, list(range(1, 13)))])
def test_the_newest_checkpoints_are_kept(make_agent, tmp_path, keep, expected):
    agent, checkpoints = make_agent(), Checkpoints(tmp_path, keep)
    for iteration in range(1, 13):
        checkpoints.save(agent, Progress(iteration, iteration * SAMPLES))
    assert names(tmp_path) == [f"iteration-{i:06d}.safetensors" for i in expected]
    assert checkpoints.load(agent) == Progress(12, 12 * SAMPLES)


# --- resuming --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("first", [1, 3])
def test_a_resumed_run_equals_the_uninterrupted_one(make_trainer, uninterrupted, trainable, first):
    make_trainer(first, trainable=trainable).run()
    resumed = make_trainer(trainable=trainable, init=5)
    resumed.run(resume=True)
    assert_equals(resumed, uninterrupted(trainable))


@pytest.mark.parametrize("dies_in", [2, 3, 4])
def test_a_killed_run_goes_on_from_its_last_checkpoint(make_trainer, uninterrupted, dies_in):
    """Killed in mid-iteration, with metrics newer than the checkpoint (in 4) and a half-written line."""
    first_call_of = 2 * (dies_in - 1) + 1
    killed = make_trainer(reward=when(first_call_of, raising(SystemExit(1))), checkpoint_every=2)
    with pytest.raises(SystemExit):
        killed.run()
    assert len(rows(killed)) == dies_in - 1
    saved = 2 * ((dies_in - 1) // 2)
    assert [path.stem for path in killed.checkpoints.paths()] == [f"iteration-{saved:06d}"] * bool(saved)
    with (killed.out / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 9, "rew')
    resumed = make_trainer(init=5, checkpoint_every=2)
    if not saved:
        with pytest.raises(FileNotFoundError, match="holds no checkpoint; train without --resume"):
            resumed.run(resume=True)
        return
    resumed.run(resume=True)
    assert_equals(resumed, uninterrupted())


def test_a_finished_run_resumes_to_the_same(make_trainer):
    finished, again = make_trainer(1), make_trainer(1, init=5)
    finished.run()
    again.run(resume=True)
    assert same_agent(Snapshot.of(again), Snapshot.of(finished))
    assert rows(again) == rows(finished) and again.done == Progress(1, SAMPLES)


def test_a_run_may_be_resumed_twice(make_trainer, uninterrupted):
    make_trainer(1).run()
    make_trainer(3, init=3).run(resume=True)
    last = make_trainer(4, init=4)
    last.run(resume=True)
    assert_equals(last, uninterrupted())


def test_pictures_of_a_resumed_run(make_trainer):
    whole, part = make_trainer(2, "whole", pictures=True, pictures_every=1), make_trainer(1, pictures=True)
    whole.run()
    part.run()
    resumed = make_trainer(2, pictures=True, init=5)
    resumed.run(resume=True)
    assert names(resumed.out / "images") == [f"iteration-{i:06d}.png" for i in (0, 1, 2)]
    for i in (0, 1, 2):
        name = f"iteration-{i:06d}.png"
        assert (resumed.out / "images" / name).read_bytes() == (whole.out / "images" / name).read_bytes()


# --- Ctrl-C ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call, iteration", [(1, 1), (4, 2)])
def test_ctrl_c_ends_after_the_iteration_with_a_checkpoint(make_trainer, uninterrupted, call, iteration):
    before = signal.getsignal(signal.SIGINT)
    trainer = make_trainer(reward=when(call, interrupt), checkpoint_every=10)
    assert trainer.run() == Progress(iteration, iteration * SAMPLES)
    assert signal.getsignal(signal.SIGINT) is before
    assert len(rows(trainer)) == iteration
    resumed = make_trainer(init=5)
    assert [path.stem for path in resumed.checkpoints.paths()] == [f"iteration-{iteration:06d}"]
    resumed.run(resume=True)
    assert_equals(resumed, uninterrupted())


def test_a_second_ctrl_c_ends_at_once(make_trainer):
    def twice(images):
        interrupt(images)
        interrupt(images)

    before = signal.getsignal(signal.SIGINT)
    trainer = make_trainer(reward=when(3, twice))
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert signal.getsignal(signal.SIGINT) is before
    assert trainer.done == Progress(1, SAMPLES)
    loaded = make_trainer(init=5)
    assert loaded.checkpoints.load(loaded.agent) == Progress(1, SAMPLES)


def test_the_same_trainer_goes_on_after_ctrl_c(make_trainer, uninterrupted):
    trainer = make_trainer(reward=when(3, interrupt))
    assert trainer.run() == Progress(2, 2 * SAMPLES)
    trainer.run(resume=True)
    assert_equals(trainer, uninterrupted())


def test_training_outside_the_main_thread(make_trainer, uninterrupted):
    trainer = make_trainer(1)
    thread = threading.Thread(target=trainer.run)
    thread.start()
    thread.join()
    assert rows(trainer) == uninterrupted().rows[:1]


# --- failures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "act, error",
    [
        (raising(ConnectionError("server gone")), RewardError),
        (lambda images: torch.full((8,), 1.0), RewardError),
    ],
    ids=["raises", "wrong-shape"],
)
def test_a_reward_that_fails_leaves_a_checkpoint_of_what_was_learned(make_trainer, uninterrupted, act, error):
    failing = make_trainer(reward=when(6, act), checkpoint_every=10)
    with pytest.raises(error):
        failing.run()
    assert failing.done == Progress(2, 16)
    resumed = make_trainer(init=5)
    resumed.run(resume=True)
    assert_equals(resumed, uninterrupted())


def test_an_iteration_without_a_usable_reward_ends_the_run_with_a_checkpoint(make_trainer):
    calls = []

    def failing(images, prompts, metadata):
        calls.append(None)
        return images.mean((1, 2, 3)) if len(calls) <= 4 else torch.full((BATCH,), float("nan"))

    trainer = make_trainer(reward=failing, checkpoint_every=10)
    with pytest.raises(NoUsableReward, match="all 8 rewards"):
        trainer.run()
    loaded = make_trainer(init=5)
    assert loaded.checkpoints.load(loaded.agent) == Progress(2, 16)
    learned, found = trainer.agent.tensors(), loaded.agent.tensors()
    assert all(torch.equal(value, found[key]) for key, value in learned.items())


def test_no_space_for_a_checkpoint_keeps_the_previous_one(make_trainer, uninterrupted, monkeypatch):
    genuine = Path.write_bytes

    def full(self, data):
        if ".iteration-000003.safetensors" in self.name:
            genuine(self, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return genuine(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        make_trainer().run()
    monkeypatch.undo()
    resumed = make_trainer(init=5)
    assert names(resumed.out / "checkpoints") == ["iteration-000001.safetensors", "iteration-000002.safetensors"]
    resumed.run(resume=True)
    assert_equals(resumed, uninterrupted())


def test_a_checkpoint_is_written_before_an_old_one_goes(make_agent, tmp_path, monkeypatch):
    agent = make_agent()
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(agent, Progress(1, 8))

    def full(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(agent, Progress(2, 16))
    assert names(tmp_path) == ["iteration-000001.safetensors"]
    assert checkpoints.load(make_agent()) == Progress(1, 8)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_checkpoint_is_named(make_agent, tmp_path, share):
    agent = make_agent()
    path = Checkpoints(tmp_path).save(agent, Progress(1, 8))
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    other = make_agent(scale=0.5)
    before = other.tensors()
    with pytest.raises(ValueError, match=r"iteration-000001\.safetensors is truncated or not a safetensors file"):
        Checkpoints(tmp_path).load(other)
    assert all(torch.equal(value, before[key]) for key, value in other.tensors().items())


@pytest.mark.parametrize(
    "metadata", [None, {"format": "pt"}, {"format": "diffusion-gym-checkpoint-999", "state": "{}"}]
)
def test_a_safetensors_file_of_another_program_is_named(make_agent, tmp_path, metadata):
    path = tmp_path / "iteration-000001.safetensors"
    save_tensors(path, {"weight": torch.zeros(3)}, metadata)
    with pytest.raises(ValueError, match=r"iteration-000001\.safetensors' is no checkpoint of diffusion-gym"):
        Checkpoints(tmp_path).load(make_agent())


def test_a_file_that_is_no_safetensors_is_named(make_agent, tmp_path):
    (tmp_path / "iteration-000001.safetensors").write_bytes(b"PK\x03\x04" + bytes(200))
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        Checkpoints(tmp_path).load(make_agent())


@pytest.mark.parametrize(
    "trainable, rank, other_trainable, other_rank",
    [("lora", 2, "lora", 4), ("lora", 4, "full", 4), ("full", 4, "lora", 4)],
)
def test_a_checkpoint_of_another_policy_is_named(make_policy, tmp_path, trainable, rank, other_trainable, other_rank):
    from diffusion_gym.agents.algorithms import DDPOIS

    agents = [
        DDPOIS(make_policy(trainable=kind, lora_rank=number), DDPOIS.Config())
        for kind, number in ((trainable, rank), (other_trainable, other_rank))
    ]
    Checkpoints(tmp_path).save(agents[0], Progress(1, 8))
    before = {key: value.clone() for key, value in agents[1].tensors().items()}
    with pytest.raises(ValueError, match="does not fit this run.*another policy; check the model, trainable"):
        Checkpoints(tmp_path).load(agents[1])
    assert all(torch.equal(value, before[key]) for key, value in agents[1].tensors().items())


def test_an_empty_folder_holds_no_checkpoint(make_agent, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        Checkpoints(tmp_path / "nothing").load(make_agent())


# --- options ---------------------------------------------------------------------------------------------------


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


def test_metrics_cut_off_by_a_kill(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"iteration": 1}\n{"iteration": 2}\n{"iterat')
    assert read_metrics(path) == [{"iteration": 1}, {"iteration": 2}]
