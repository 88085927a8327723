"""No interruption changes the result of a training: kills, Ctrl-C, rewards that fail, full disks."""

import errno
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from diffusion_gym.agents.algorithms import NoUsableReward
from diffusion_gym.agents.training import ending
from diffusion_gym.agents.training.checkpoint import Progress
from diffusion_gym.rewards import RewardError
from diffusion_gym.rewards.time_limit import TimeLimited, limited
from run_folders import file_names, metrics_rows
from trainer_runs import BATCH, SAMPLES, Snapshot, assert_equals, interrupt, raising, same_agent, when

# --- resuming --------------------------------------------------------------------------------------------------------


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
    killed = make_trainer(checkpoint_every=2)
    update, updates = killed.agent.update, iter(range(1, 5))

    def dying(*given):
        if next(updates) == dies_in:
            raise SystemExit(1)
        return update(*given)

    killed.agent.update = dying
    with pytest.raises(SystemExit):
        killed.run()
    assert len(metrics_rows(killed.out)) == dies_in - 1
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
    assert metrics_rows(again.out) == metrics_rows(finished.out) and again.done == Progress(1, SAMPLES)


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
    assert file_names(resumed.out / "images") == [f"iteration-{i:06d}.png" for i in (0, 1, 2)]
    for i in (0, 1, 2):
        name = f"iteration-{i:06d}.png"
        assert (resumed.out / "images" / name).read_bytes() == (whole.out / "images" / name).read_bytes()


def images(trainer):
    return {path.name: path.read_bytes() for path in (trainer.out / "images").iterdir()}


@pytest.mark.parametrize("left", [(), ("iteration-000003.png", "iteration-000004.png", "iteration-best.png")])
def test_pictures_after_a_signal(make_trainer, left):
    """A signal leaves no grid that is not due, and what is there of iterations that are repeated is removed first."""
    options = {"pictures": True, "pictures_every": 2, "checkpoint_every": 2}
    whole = make_trainer(4, "whole", **options)
    whole.run()
    part = make_trainer(4, reward=when(5, interrupt), **options)
    assert part.run().iteration == 3
    for name in left:
        (part.out / "images" / name).write_bytes(b"another picture")
    resumed = make_trainer(4, init=5, **options)
    if left:  # as if the checkpoint of the third iteration had not been written
        part.checkpoints.paths()[-1].unlink()
    resumed.run(resume=True)
    found, expected = (
        {path.name: path.read_bytes() for path in (trainer.out / "images").iterdir()} for trainer in (resumed, whole)
    )
    assert found.pop("iteration-best.png", None) == (b"another picture" if left else None)
    assert found == expected


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call, iteration", [(1, 1), (4, 2)])
def test_ctrl_c_ends_after_the_iteration_with_a_checkpoint(make_trainer, uninterrupted, call, iteration):
    before = signal.getsignal(signal.SIGINT)
    trainer = make_trainer(reward=when(call, interrupt), checkpoint_every=10)
    assert trainer.run() == Progress(iteration, iteration * SAMPLES)
    assert signal.getsignal(signal.SIGINT) is before
    assert len(metrics_rows(trainer.out)) == iteration
    resumed = make_trainer(init=5)
    assert [path.stem for path in resumed.checkpoints.paths()] == [f"iteration-{iteration:06d}"]
    resumed.run(resume=True)
    assert_equals(resumed, uninterrupted())


def test_a_second_ctrl_c_ends_at_once_with_a_checkpoint(make_trainer, uninterrupted):
    def twice(images):
        interrupt(images)
        interrupt(images)

    before = signal.getsignal(signal.SIGINT)
    trainer = make_trainer(reward=when(3, twice), checkpoint_every=10)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert signal.getsignal(signal.SIGINT) is before
    assert trainer.done == Progress(1, SAMPLES)
    resumed = make_trainer(init=5)
    resumed.run(resume=True)
    assert_equals(resumed, uninterrupted())


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
    assert metrics_rows(trainer.out) == uninterrupted().rows[:1]


# --- rewards that hang -----------------------------------------------------------------------------------------------


@pytest.fixture
def hang():
    """`hang(*signals)`: an action of a reward that sends this process signals, and does not return for ten minutes."""
    ended = threading.Event()

    def make(*signals):
        def act(images):
            for signum in signals:
                os.kill(os.getpid(), signum)
            ended.wait(600)

        return act

    yield make
    ended.set()


@pytest.mark.parametrize("name, limit", [("SIGINT", None), ("SIGTERM", 600.0), ("SIGHUP", None), ("SIGUSR1", 600.0)])
def test_a_signal_ends_a_run_whose_reward_hangs_with_a_checkpoint(
    make_trainer, uninterrupted, hang, monkeypatch, capsys, name, limit
):
    monkeypatch.setattr(ending, "_PATIENCE", 0.1)
    before = {number: signal.getsignal(number) for number in ending.ENDING}
    reward = limited(when(4, hang(getattr(signal, name))), limit)
    trainer = make_trainer(reward=reward, checkpoint_every=10)
    with pytest.raises(KeyboardInterrupt, match=r"^reward='scored' has not answered for \d+ s to a run"):
        trainer.run()
    assert {number: signal.getsignal(number) for number in ending.ENDING} == before
    assert capsys.readouterr().out.count("Stopping after this iteration") == 1
    resumed = make_trainer(init=5)
    resumed.run(resume=True)
    assert_equals(resumed, uninterrupted())


def test_two_ctrl_c_end_a_run_whose_reward_hangs_without_any_patience(make_trainer, hang):
    trainer = make_trainer(reward=when(3, hang(signal.SIGINT, signal.SIGINT)), checkpoint_every=10)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert [path.stem for path in trainer.checkpoints.paths()] == ["iteration-000001"]


def test_a_reward_that_is_slow_is_waited_for(make_trainer, monkeypatch):
    """It has taken as long before."""
    monkeypatch.setattr(ending, "_PATIENCE", 0.0)
    calls = []

    def slow(images, prompts, metadata):
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(2.0 if len(calls) == 1 else 1.0)
        return images.mean((1, 2, 3))

    assert make_trainer(reward=slow).run() == Progress(2, 2 * SAMPLES)


def test_a_reward_that_takes_longer_than_its_limit_leaves_a_checkpoint(make_trainer, uninterrupted, hang):
    def late(images):
        limit.seconds = 0.05
        hang()(images)

    limit = TimeLimited(when(6, late), 600.0)
    trainer = make_trainer(reward=limit, checkpoint_every=10)
    with pytest.raises(RewardError, match=r"reward='scored': the reward has not returned for .* \(reward_sec"):
        trainer.run()
    resumed = make_trainer(init=5)
    resumed.run(resume=True)
    assert_equals(resumed, uninterrupted())


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "act, error",
    [
        (raising(ConnectionError("server gone")), RewardError),
        (lambda images: torch.full((8,), 1.0), RewardError),
        (raising(SystemExit(3)), RewardError),
        (raising(KeyboardInterrupt()), RewardError),
        (raising(BaseException("all of it")), RewardError),
    ],
    ids=["raises", "wrong-shape", "exits", "interrupts", "base"],
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
    assert file_names(resumed.out / "checkpoints") == ["iteration-000001.safetensors", "iteration-000002.safetensors"]
    resumed.run(resume=True)
    assert_equals(resumed, uninterrupted())
