"""Floors under components of the reward: the Lagrangian by hand, a constraint that binds, checkpoints, refusals."""

import json
from dataclasses import fields

import numpy as np
import pytest
import torch

from diffusion_gym.agents.algorithms import AGENTS, DDPOIS
from diffusion_gym.agents.processes import Processes
from diffusion_gym.agents.reward_floors import RewardFloorOptions, RewardFloors
from diffusion_gym.agents.rollout import Trajectories
from diffusion_gym.agents.training.checkpoint import Checkpoints, Progress
from diffusion_gym.agents.training.trainer import Schedule, Trainer
from diffusion_gym.rewards import RewardOutput, make_reward
from run_folders import CARRYING_OPTIONS, metrics_rows

SAMPLES = 4


def rolled(rewards, **components):
    empty = torch.empty(0)
    rewards = torch.as_tensor(rewards, dtype=torch.float32)
    parts = {name: torch.as_tensor(values, dtype=torch.float32) for name, values in components.items()}
    return Trajectories(("a",) * len(rewards), None, empty, empty, empty, rewards, parts, empty)


def floors(*given, step=0.1):
    return RewardFloors(RewardFloorOptions(given, step), Processes())


def test_the_lagrangian_and_its_multipliers_by_hand():
    held = floors("a=2", "b=-1", step=0.5)
    rewards, a, b = np.array([1.0, 5.0, 3.0, 7.0]), np.array([0.0, 1.0, 2.0, 3.0]), np.array([10.0, -10.0, 0.0, 4.0])
    first = rolled(rewards, a=a, b=b, other=[np.nan] * 4)
    means = held.measure(first)
    assert means == {"a": 1.5, "b": 1.0}
    assert held.constrained(first) is first  # nothing is below its floor yet
    assert held.advance(means) == {"a_multiplier": 0.0, "b_multiplier": 0.0}
    assert held.multipliers == pytest.approx({"a": 0.5 * (2 - 1.5) / a.std(), "b": 0.0})
    lam = held.multipliers["a"]
    later = rolled(10 * rewards, a=a - 1, b=b)
    held.measure(later)  # the deviations stay those of the first
    expected = (10 * rewards + lam * rewards.std() / a.std() * (a - 1 - 2)) / (1 + lam)
    np.testing.assert_allclose(held.constrained(later).rewards.numpy(), expected, rtol=1e-6)
    assert held.advance({"a": 100.0, "b": float("nan")})["a_multiplier"] == lam
    assert held.multipliers == {"a": 0.0, "b": 0.0}


def test_a_component_that_failed_spoils_its_sample_where_it_counts():
    held = floors("a=1")
    first = rolled([1, 2, 3], a=[0, np.nan, 0.5])
    means = held.measure(first)
    assert means == {"a": 0.25} and torch.equal(held.constrained(first).rewards, first.rewards)
    held.advance(means)
    assert held.constrained(first).rewards.isfinite().tolist() == [True, False, True]


def test_a_floor_binds():
    """x ~ N(theta, 1), r = -(x - 3)^2, c = -x and E[c] >= -1: theta comes to 3, and with the floor to 1."""

    def ascended(held):
        rng, theta = np.random.default_rng(0), -3.0
        for _ in range(3000):
            x = theta + rng.normal(size=256)
            sampled = rolled(-((x - 3) ** 2), c=-x)
            means = held.measure(sampled) if held else {}
            learned = (held.constrained(sampled) if held else sampled).rewards.double().numpy()
            theta += 0.05 * float((learned * (x - theta)).mean() - learned.mean() * (x - theta).mean())
            held.advance(means)
        return theta

    assert ascended(floors()) == pytest.approx(3.0, abs=0.15)
    held = floors("c=-1", step=0.05)
    assert ascended(held) == pytest.approx(1.0, abs=0.15)
    slope, ratio = 2 * (3 - 1), held.state()["deviations"]["c"] / held.state()["deviations"][""]
    assert held.multipliers["c"] == pytest.approx(slope * ratio, rel=0.15)  # where the two gradients are equal


def test_deviation_of_a_constant_is_1():
    held = floors("a=1")
    held.advance(held.measure(rolled([2, 2], a=[0, 0])))
    assert held.multipliers == {"a": 0.1}
    assert held.constrained(rolled([2, 2], a=[3, 4])).rewards.tolist() == pytest.approx([2.2 / 1.1, 2.3 / 1.1])


def reward(images, prompts, metadata):
    return RewardOutput(images.mean((1, 2, 3)), {"red": images[:, 0].mean((1, 2))})


@pytest.fixture
def trainer(make_env, make_agent, tmp_path):
    def build(out, name="ddpo_is", iterations=4, scored=reward, **options):
        env = make_env(SAMPLES, num_inference_steps=3, reward=scored, autoreset_mode="Disabled")
        known = {entry.name for entry in fields(AGENTS[name].Config)}
        given = {**CARRYING_OPTIONS, "batch_size": 2, "micro_batch_size": 16, "reward_floors": ("red=0.9",), **options}
        agent = make_agent(env, agent=AGENTS[name], **{key: value for key, value in given.items() if key in known})
        schedule = Schedule(iterations * SAMPLES, SAMPLES, checkpoint_every=2, pictures_every=0, keep_checkpoints=9)
        return Trainer(env, agent, tmp_path / out, schedule, progress=False, track="none")

    return build


@pytest.mark.parametrize("name", [name for name in AGENTS if name != "reward_gradient"])
def test_a_resumed_run_equals_the_whole_with_floors_held(name, trainer):
    whole = trainer("whole", name)
    whole.run()
    rows = metrics_rows(whole.out)
    multipliers = [row["red_multiplier"] for row in rows]
    assert multipliers[0] == 0 and (np.diff([*multipliers, whole.agent.floors.multipliers["red"]]) > 0).all()
    cut = trainer("cut", name)
    cut.run(until=2 * SAMPLES)
    again = trainer("cut", name)
    again.run(resume=True)
    assert metrics_rows(again.out) == rows
    assert again.agent.state() == whole.agent.state() and "floors" in whole.agent.state()
    found, wanted = again.agent.tensors(), whole.agent.tensors()
    assert all(torch.equal(found[key], value) for key, value in wanted.items())


def test_a_floor_changes_what_is_learned_and_not_what_is_logged(trainer):
    held, free = trainer("held"), trainer("free", reward_floors=())
    held.run()
    free.run()
    first, second = metrics_rows(held.out), metrics_rows(free.out)
    assert first[0]["reward_mean"] == second[0]["reward_mean"] and first[0]["loss"] == second[0]["loss"]
    assert first[-1]["loss"] != second[-1]["loss"]
    assert "floors" not in free.agent.state() and "red_multiplier" not in second[0]


def test_an_update_that_fails_leaves_the_multipliers(trainer, monkeypatch):
    built = trainer("one")

    def fail(self, trajectories, rng):
        raise ValueError("no")

    monkeypatch.setattr(DDPOIS, "update", fail)
    with pytest.raises(ValueError, match="no"):
        built.run()
    assert built.agent.floors.multipliers == {"red": 0.0}


@pytest.mark.parametrize("change", ["lacks", "other", "negative", "unknown"])
def test_a_checkpoint_with_other_floors_is_refused(change, trainer, tmp_path, monkeypatch):
    agent, other = (
        trainer("one").agent,
        trainer("two", reward_floors=("green=0.9",) if change == "other" else ("red=0.9",)),
    )
    agent.floors.measure(rolled([1, 2], red=[0, 1]))
    state = agent.state()
    if change == "lacks":
        del state["floors"]
    elif change == "negative":
        state["floors"]["multipliers"]["red"] = -1.0
    elif change == "unknown":
        state["floors"]["more"] = 1
    monkeypatch.setattr(agent, "state", lambda: json.loads(json.dumps(state)))
    path = Checkpoints(tmp_path / "checkpoints").save(agent, Progress(1, 4))
    with pytest.raises(ValueError, match="does not fit this run: .*(floors|multiplier)"):
        Checkpoints(tmp_path / "checkpoints").load(other.agent, path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward_floors": ("red",)}, "reward_floors='red' must be NAME=VALUE"),
        ({"reward_floors": ("=1",)}, "reward_floors='=1'"),
        ({"reward_floors": ("red=nan",)}, "reward_floors='red=nan'"),
        ({"reward_floors": ("red=1", "red=2")}, "reward_floors='red=2' must be NAME=VALUE, each name once"),
        ({"reward_floors": ("red=1",), "floor_step": 0.0}, "floor_step=0.0 must be larger than 0"),
        (
            {"reward_floors": ("red=1",), "component_weights": ("red=1",), "normalization": "batch"},
            "give one of the two",
        ),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DDPOIS.Config(**options)


def test_the_rewards_gradient_takes_no_floors():
    with pytest.raises(ValueError, match=r"reward_floors=\('red=1',\) is for agents that learn from scores"):
        AGENTS["reward_gradient"].Config(reward_floors=("red=1",))


def test_unknown_components_are_refused_a_sums_before_anything_runs(trainer):
    with pytest.raises(ValueError, match="reward_floors='rad' is unknown; did you mean 'red'"):
        trainer("one", reward_floors=("rad=1",)).run()
    total = make_reward({"Compressibility": 1.0, "Incompressibility": 0.0})
    with pytest.raises(ValueError, match="reward_floors='red' is unknown; known: Compressibility, Incompressibility"):
        trainer("two", scored=total)
    trainer("three", scored=total, reward_floors=("Incompressibility=-3",))


def test_values_are_those_of_the_components_over_all_processes():
    """Two processes with a half each hold what one holds."""

    class Two(Processes):
        def gather(self, tensor):
            return torch.cat([tensor, tensor + 2])

        def gather_json(self, value):
            return [value, value]

    both = RewardFloors(RewardFloorOptions(("a=9",)), Two())
    one = floors("a=9")
    assert both.measure(rolled([1, 2], a=[0, 1])) == one.measure(rolled([1, 2, 3, 4], a=[0, 1, 2, 3]))
    assert both.state() == one.state()
