"""A resumed run equals the uninterrupted one, bit for bit: every agent of the registry, in one process."""

import shutil
from dataclasses import fields, replace

import pytest
import torch

from diffusion_gym.agents.algorithms import AGENTS
from diffusion_gym.agents.training.checkpoint import checksum
from diffusion_gym.agents.training.trainer import Schedule, Trainer, read_metrics
from diffusion_gym.rewards import RewardOutput
from diffusion_gym.storage import load_tensors, save_tensors, tensors_metadata
from run_folders import CARRYING_OPTIONS, metrics_rows

SAMPLES, ITERATIONS = 4, 4
OPTIONS = {**CARRYING_OPTIONS, "batch_size": 2, "micro_batch_size": 16, "replay_iterations": 3}


def reward(images, prompts, metadata):
    scores = images.mean((1, 2, 3))
    return RewardOutput(scores, {"red": images[:, 0].mean((1, 2))})


reward.differentiable = True


@pytest.fixture(scope="module")
def build(make_env, make_agent):
    """`build(out, name, iterations, ...)`: every call builds all anew, as a new process would."""

    def make(out, name, iterations=ITERATIONS, trainable="lora", init=0, total=ITERATIONS * SAMPLES, **options):
        env = make_env(SAMPLES, num_inference_steps=2, reward=reward, autoreset_mode="Disabled")
        known = {entry.name for entry in fields(AGENTS[name].Config)}
        chosen = {key: value for key, value in {**OPTIONS, **options}.items() if key in known}
        agent = make_agent(env, trainable, scale=0.02, agent=AGENTS[name], **chosen)
        if init:  # other weights than those of the run: a resumed run must not depend on them
            generator = torch.Generator().manual_seed(init)
            modules = [agent.policy.unet, *(part for part in vars(agent).values() if isinstance(part, torch.nn.Module))]
            with torch.no_grad():
                for parameter in {p for module in modules for p in module.parameters() if p.requires_grad}:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        schedule = Schedule(total, SAMPLES, checkpoint_every=1, pictures_every=0, keep_checkpoints=9)
        trainer = Trainer(env, agent, out, schedule, progress=False)
        if iterations < ITERATIONS:  # ends early, as by Ctrl-C: the schedule of the learning rate stays that of 4
            trainer._asked_to_stop = lambda: trainer.done.iteration == iterations
        return trainer

    return make


@pytest.fixture(scope="module")
def whole(build, tmp_path_factory):
    """`whole(name, **options)`: an uninterrupted run, finished."""
    known = {}

    def run(name, **options):
        key = (name, *sorted(options.items()))
        if key not in known:
            known[key] = build(tmp_path_factory.mktemp(name), name, **options)
            known[key].run()
        return known[key]

    return run


def cut(trainer, out, iteration):
    """Copy a run as a kill after `iteration` leaves it, the metrics being ahead of the checkpoint; its checkpoint."""
    path = out / "checkpoints" / f"iteration-{iteration:06d}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(trainer.out / "checkpoints" / path.name, path)
    shutil.copy(trainer.out / "metrics.jsonl", out)
    return path


def same(first, second):
    """Whether two runs left the same: metrics without clocks, tensors bit for bit, other state, progress."""
    tensors, other_tensors = first.agent.tensors(), second.agent.tensors()
    return (
        metrics_rows(first.out) == metrics_rows(second.out)
        and tensors.keys() == other_tensors.keys()
        and all(torch.equal(value, other_tensors[key]) for key, value in tensors.items())
        and first.agent.state() == second.agent.state()
        and first.done == second.done
    )


@pytest.mark.parametrize("name", AGENTS)
def test_a_run_that_stops_at_every_iteration(build, whole, tmp_path, name):
    assert build(tmp_path, name, 1).run().iteration == 1
    for iteration in range(2, ITERATIONS + 1):
        last = build(tmp_path, name, iteration, init=iteration)
        assert last.run(resume=True).iteration == iteration
    assert same(last, whole(name))
    # half a cosine after a warm-up over a quarter of the run: iterations begin at 0, 1/4, 1/2 and 3/4 of it
    rates = [row["learning_rate"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert rates == pytest.approx([1e-4, 1e-3, 0.75e-3, 0.25e-3], rel=1e-6)


@pytest.mark.parametrize("name", AGENTS)
def test_with_full_fine_tuning_and_groups(build, whole, tmp_path, name):
    options = {"trainable": "full", "group_size": 2, "normalization": "group"}
    cut(whole(name, **options), tmp_path, 2)
    resumed = build(tmp_path, name, init=5, **options)
    resumed.run(resume=True)
    assert same(resumed, whole(name, **options))


@pytest.mark.parametrize("name", ["ddpo_sf", "ddpo_is", "ddpo_iskl"])
def test_on_pictures_noised_anew(build, whole, tmp_path, name):
    options = {"renoise": True, **({"kl_form": "closed_form"} if name == "ddpo_iskl" else {})}
    cut(whole(name, **options), tmp_path, 2)
    resumed = build(tmp_path, name, init=5, **options)
    resumed.run(resume=True)
    assert same(resumed, whole(name, **options)) and not same(resumed, whole(name))


@pytest.fixture(scope="module")
def seen():
    """Parts of checkpoints that the test below has changed already: all agents share the optimiser, the average, ..."""
    return set()


@pytest.mark.parametrize("name", AGENTS)
def test_each_part_of_a_checkpoint_matters(build, whole, seen, tmp_path, name):
    """The comparison above sees every part of the state: with one of them changed, the runs differ."""
    path = cut(whole(name), tmp_path, ITERATIONS - 1)
    tensors, metadata = load_tensors(path), tensors_metadata(path)
    parts = {".".join(key.split(".")[: 2 if key.startswith("replay") else 1]) for key in tensors}
    assert {"policy", "average", "optimizer"} <= parts
    new = sorted({"policy", *parts} - seen) or ["policy"]
    seen |= parts
    for part in new:
        changed = {k: v * 0.5 if k.startswith(f"{part}.") and v.is_floating_point() else v for k, v in tensors.items()}
        save_tensors(path, changed, metadata | {"sha256": checksum(changed, metadata["state"])})
        resumed = build(tmp_path, name)
        resumed.checkpoints.save = lambda *_: None  # the next part begins from the same checkpoint
        resumed.run(resume=True)
        assert not same(resumed, whole(name)), part


@pytest.mark.parametrize("rate, equal", [("constant", True), ("warmup_cosine", False)])
def test_a_longer_run_goes_on_where_a_shorter_one_ended(build, whole, tmp_path, rate, equal):
    """With a schedule the shorter run has used other learning rates; without, it is the beginning of the longer one."""
    build(tmp_path, "ddpo_is", total=2 * SAMPLES, learning_rate_schedule=rate).run()
    longer = build(tmp_path, "ddpo_is", init=5, learning_rate_schedule=rate)
    assert longer.run(resume=True).iteration == ITERATIONS
    assert same(longer, whole("ddpo_is", learning_rate_schedule=rate)) is equal


def test_pictures_that_a_kill_prevented_are_made_on_resuming(build, make_env, tmp_path):
    """A kill may come between a checkpoint and the pictures of that iteration."""
    whole, part = build(tmp_path / "whole", "ddpo_is"), build(tmp_path / "part", "ddpo_is")
    for trainer in (whole, part):
        trainer.schedule = replace(trainer.schedule, pictures_every=2)
        trainer.pictures_env = make_env(4, num_inference_steps=2)
    whole.run()
    cut(whole, part.out, 2)
    part.run(resume=True)
    pictures = {path.name: path.read_bytes() for path in (part.out / "images").iterdir()}
    assert list(sorted(pictures)) == ["iteration-000002.png", "iteration-000004.png"]
    assert all((whole.out / "images" / name).read_bytes() == data for name, data in pictures.items())


def test_unfinished_files_of_a_kill_are_removed(build, tmp_path):
    left = [
        tmp_path / "checkpoints" / ".iteration-000001.safetensors.ab12.unfinished",
        tmp_path / ".config.json.x.unfinished",
    ]
    kept = [tmp_path / ".note", tmp_path / "config.json", tmp_path / "a.unfinished"]
    left[0].parent.mkdir()
    for path in (*left, *kept):
        path.write_text("half")
    build(tmp_path, "ddpo_is", 1).run()
    assert not any(path.exists() for path in left)
    assert all(path.read_text() == "half" for path in kept)


def test_an_embedding_depends_on_no_other_prompt(make_policy, monkeypatch):
    """Else a resumed run, which meets the prompts in other company, could differ in the last digit."""
    policy, sizes = make_policy(), []
    genuine = policy.model.embed
    monkeypatch.setattr(policy.model, "embed", lambda tokens: (sizes.append(len(tokens)), genuine(tokens))[1])
    tokens = policy.model.tokenize(["a red circle", "two blue stars", "a red circle", "a green square"])
    first, again = policy.embed(tokens), policy.embed(tokens)
    assert sizes == [1, 1, 1]
    assert torch.equal(first, again) and torch.allclose(first, genuine(tokens), atol=1e-6)
