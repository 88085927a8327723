"""Checkpoints that are not what was written, records that are none, updates that spoil: said, and nothing lost."""

import json
import math
import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch

from diffusion_gym.agents.algorithms import AGENTS, Diverged
from diffusion_gym.agents.training.checkpoint import Checkpoints, DamagedCheckpoint, Progress, checksum
from diffusion_gym.storage import load_tensors, save_tensors, tensors_metadata
from run_folders import file_names, metrics_rows
from trainer_runs import SAMPLES, Snapshot, assert_equals, same_agent, when

# --- damaged checkpoints ---------------------------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1000] ^= 4
    path.write_bytes(bytes(data))


def rewritten(change):
    """`change(tensors, metadata)` on what the file holds, its checksum left as it was."""

    def act(path):
        tensors, metadata = load_tensors(path), tensors_metadata(path)
        change(tensors, metadata)
        save_tensors(path, tensors, metadata)

    return act


def without_moments(tensors, metadata):
    for name in [name for name in tensors if name.startswith("optimizer.")]:
        del tensors[name]


def other_progress(tensors, metadata):
    metadata["state"] = json.dumps({**json.loads(metadata["state"]), "iteration": 7})


DAMAGES = {
    "truncated": truncate,
    "one bit": flip,
    "without the optimiser's moments": rewritten(without_moments),
    "another state": rewritten(other_progress),
    "without a checksum": rewritten(lambda tensors, metadata: metadata.pop("sha256")),
    "no state": rewritten(lambda tensors, metadata: metadata.pop("state")),
}


@pytest.fixture(scope="module")
def trained(build, tmp_path_factory):
    trainer = build(tmp_path_factory.mktemp("trained") / "run", 3)
    trainer.run()
    return trainer


@pytest.fixture
def resumed(trained, make_trainer):
    """A trainer of 4 iterations in a copy of the folder of the run of 3, to go on with."""
    found = make_trainer(init=5)
    shutil.copytree(trained.out, found.out, dirs_exist_ok=True)
    return found


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_said_and_an_older_one_is_gone_on_from_on_request(resumed, uninterrupted, damage):
    newest = resumed.checkpoints.paths()[-1]
    damage(newest)
    before, held = Snapshot.of(resumed), newest.read_bytes()
    with pytest.raises(DamagedCheckpoint, match=r"iteration-000002\.safetensors is whole.*--resume-from-older"):
        resumed.run(resume=True)
    assert same_agent(Snapshot.of(resumed), before) and len(metrics_rows(resumed.out)) == 3
    assert newest.read_bytes() == held and file_names(newest.parent)[-1] == newest.name
    resumed.restore(older=True)
    assert resumed.done == Progress(2, 2 * SAMPLES)
    assert file_names(newest.parent)[-1] == f"{newest.name}.damaged"
    resumed.run()
    assert_equals(resumed, uninterrupted())
    assert [path.stem for path in resumed.checkpoints.paths()] == ["iteration-000003", "iteration-000004"]


def test_without_a_whole_checkpoint_none_is_touched(resumed):
    names = file_names(resumed.out / "checkpoints")
    for path in resumed.checkpoints.paths():
        flip(path)
    for older in (False, True):
        with pytest.raises(DamagedCheckpoint, match="its checksum differs; no checkpoint of .* is whole"):
            resumed.restore(older=older)
    assert file_names(resumed.out / "checkpoints") == names


def add(name):
    def change(tensors, state):
        tensors[name] = torch.zeros(2)

    return change


def turn(prefix, function):
    def change(tensors, state):
        name = max(name for name in tensors if name.startswith(prefix))
        tensors[name] = function(tensors[name])

    return change


def remove(prefix):
    def change(tensors, state):
        del tensors[next(name for name in tensors if name.startswith(prefix))]

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (add("surprise.weight"), "has the unknown tensor 'surprise.weight'"),
        (remove("policy."), "weights of another policy"),
        (remove("optimizer.0.exp_avg_sq"), "the optimiser's '0.exp_avg_sq' is missing"),
        (
            turn("optimizer.0.exp_avg", lambda value: value[None]),
            r"the optimiser's '\S*' has shape \(1, .*its parameter has",
        ),
        (add("optimizer.99999.exp_avg"), "the optimiser's '99999.exp_avg' is of none of its"),
        (add("optimizer.x.exp_avg"), "the optimiser's 'x.exp_avg' is of none of its"),
        (turn("policy.", torch.Tensor.half), r"its tensor 'policy\S*' is torch.float16 .* to be torch.float32"),
        (lambda tensors, state: state["agent"].pop("prompt_statistics"), "prompt_statistics"),
        (lambda tensors, state: state["agent"].update(surprise=1), "has the unknown state 'surprise'"),
        (lambda tensors, state: state["agent"]["optimizer"].update(micro_batch_size="4"), "micro_batch_size='4'"),
        (lambda tensors, state: state["agent"]["optimizer"].pop("loss_scale"), "'optimizer.loss_scale' is missing"),
        (lambda tensors, state: state["agent"].update(prompt_statistics={"a": [None]}), "prompt_statistics.a.0=None"),
    ],
)
def test_a_missing_or_unknown_part_is_refused_although_the_checksum_fits(trained, make_trainer, change, message):
    path = trained.checkpoints.paths()[-1]
    tensors, metadata = load_tensors(path), tensors_metadata(path)
    state = json.loads(metadata["state"])
    change(tensors, state)
    text = json.dumps(state)
    other = make_trainer().out / "checkpoints" / path.name
    save_tensors(other, tensors, {**metadata, "state": text, "sha256": checksum(tensors, text)})
    resumed = make_trainer(init=5)
    before = Snapshot.of(resumed)
    with pytest.raises(ValueError, match=rf"iteration-000003\.safetensors' does not fit this run.*{message}"):
        resumed.restore()
    assert same_agent(Snapshot.of(resumed), before)


def test_a_checkpoint_of_an_earlier_version_is_read(trained, make_trainer):
    path = trained.checkpoints.paths()[-1]
    metadata = tensors_metadata(path)
    earlier = {"format": "diffusion-gym-checkpoint-1", "state": metadata["state"]}
    resumed = make_trainer(init=5)
    save_tensors(resumed.out / "checkpoints" / path.name, load_tensors(path), earlier)
    resumed.restore()
    assert same_agent(Snapshot.of(resumed), Snapshot.of(trained))


# --- updates that spoil ----------------------------------------------------------------------------------------------


def spoil_gradient(trainer, value):
    trainer.agent.optimizer.parameters[0].register_hook(lambda gradient: gradient * value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_update_that_spoils_the_weights_is_blamed_and_no_checkpoint_holds_it(make_trainer, uninterrupted, value):
    make_trainer(2, keep_checkpoints=1).run()
    broken = make_trainer(keep_checkpoints=1)
    broken.restore()
    spoil_gradient(broken, value)
    with pytest.raises(
        Diverged, match=r"the update of iteration 3 left weights or moments that are not finite"
    ) as told:
        broken.run()
    assert "action" not in str(told.value)
    assert len(metrics_rows(broken.out)) == 2 and file_names(broken.out / "checkpoints") == [
        "iteration-000002.safetensors"
    ]
    resumed = make_trainer(init=5)
    resumed.run(resume=True)
    assert_equals(resumed, uninterrupted())


@pytest.mark.parametrize("name", ["ddpo_is", "dpok"])
def test_every_learned_part_is_looked_at_before_a_save(make_env, make_agent, tmp_path, name):
    env = make_env(4, num_inference_steps=2, autoreset_mode="Disabled")
    agent = make_agent(env, agent=AGENTS[name], batch_size=4, ema_decay=0.5)
    agent.update(agent.sample(env, 4, (0, 0)), np.random.default_rng(0))
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(agent, Progress(1, 4))
    tensors = [value for value in agent.learned() if value.is_floating_point() and value.numel()]
    assert len(tensors) >= 4 * len(agent.parameters)  # weights, average, two moments
    for index in (0, len(agent.parameters), 2 * len(agent.parameters) + 1, len(tensors) - 1):
        kept = tensors[index].detach().clone()
        for value in (math.nan, -math.inf):
            with torch.no_grad():
                tensors[index].view(-1)[-1] = value
            with pytest.raises(Diverged):
                checkpoints.save(agent, Progress(2, 8))
            assert file_names(tmp_path) == ["iteration-000001.safetensors"]
        with torch.no_grad():
            tensors[index].copy_(kept)
    checkpoints.save(agent, Progress(2, 8))


@pytest.mark.parametrize("name", ["learning_rate", "adam_epsilon", "max_grad_norm", "lora_rank"])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_an_option_that_must_be_positive(name, value):
    with pytest.raises(ValueError, match=rf"^{name}={value!r} must be (larger than 0|at least 1|finite)"):
        AGENTS["ddpo_is"].Config(**{name: value})


RATES = ("first_learning_rate", "last_learning_rate", "weight_decay", "kl_weight", "value_learning_rate")
DECAYS = ("adam_beta1", "adam_beta2", "ema_decay")


@pytest.mark.parametrize(
    "name, value",
    [
        *((name, value) for name in RATES for value in (-1e-9, math.nan, math.inf)),
        *((name, value) for name in DECAYS for value in (-0.1, 1.0, math.nan)),
        *((name, math.nan) for name in ("reward_weight", "advantage_clip", "clip_range", "timestep_fraction")),
        ("trained_steps", (0.0, math.nan)),
    ],
)
def test_an_option_out_of_its_range_is_named(name, value):
    for agent in map(AGENTS.__getitem__, AGENTS):
        if name in agent.Config.__dataclass_fields__:
            with pytest.raises(ValueError, match=rf"^{name}={re.escape(repr(value))} "):
                agent.Config(**{name: value})


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1"])
def test_the_signals_of_schedulers_end_after_the_iteration_with_a_checkpoint(make_trainer, uninterrupted, name, capsys):
    signum = getattr(signal, name)
    before = signal.getsignal(signum)

    def twice(images):  # a launcher passes on what the scheduler sent to all
        os.kill(os.getpid(), signum)
        os.kill(os.getpid(), signum)

    trainer = make_trainer(reward=when(3, twice), checkpoint_every=10)
    assert trainer.run() == Progress(2, 2 * SAMPLES)
    assert signal.getsignal(signum) is before
    assert capsys.readouterr().out.count(f"Stopping after this iteration ({name})") == 1
    resumed = make_trainer(init=5)
    resumed.run(resume=True)
    assert_equals(resumed, uninterrupted())


def test_a_signal_that_is_ignored_stays_ignored(make_trainer):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        trainer = make_trainer(2, reward=when(1, lambda images: os.kill(os.getpid(), signal.SIGHUP)))
        assert trainer.run() == Progress(2, 2 * SAMPLES)
    finally:
        signal.signal(signal.SIGHUP, before)
