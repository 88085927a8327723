"""The wrappers on single environments: views of the vector wrappers that behave as Gymnasium's own wrappers."""

import copy
import inspect
import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import wrappers
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env

from diffusion_gym import wrappers as ours
from diffusion_gym.rewards import RewardOutput
from diffusion_gym.wrappers.single import SingleWrapper

KINDS = [kind for kind in map(vars(ours).get, ours.__all__) if issubclass(kind, SingleWrapper)]
T = 4


class Witness:
    """Notes what it is asked; its answer is 2 r + 1."""

    def __init__(self):
        self.asked = []

    def normalize(self, prompts, rewards):
        self.asked.append((list(prompts), rewards.tolist()))
        return 2 * rewards + 1


def scored(images, prompts, metadata):
    """Depends on the prompt too, so that a reward of the wrong one shows."""
    lengths = torch.tensor([float(len(prompt)) for prompt in prompts])
    return RewardOutput(images.mean((1, 2, 3)) + lengths, {"length": lengths})


@pytest.fixture
def arguments(toy, tmp_path):
    """`arguments(kind, place)`: those of a wrapper beside its environment."""

    def made(kind, place="single"):
        return {
            ours.KLPenalty: {"policy": toy, "beta": 0.25},
            ours.OneStep: {},
            ours.PreviewReward: {"denoiser": toy, "every": 2},
            ours.PromptNormalization: {"statistics": Witness()},
            ours.RecordPictures: {"folder": tmp_path / place, "every": 2},
        }[kind]

    return made


@pytest.fixture
def wrapped(make_single, arguments):
    """`wrapped(kind, env)`: a single environment in a wrapper."""

    def made(kind, env=None, **keywords):
        return kind(make_single(reward=scored, **keywords) if env is None else env, **arguments(kind))

    return made


def test_each_wrapper_is_for_both():
    assert {kind.kind for kind in KINDS} == {vars(ours)[f"{kind.__name__}VectorEnv"] for kind in KINDS}
    assert len(ours.__all__) == 2 * len(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_it_equals_row_0_of_the_vector_wrapper(kind, wrapped, arguments, make_env, actions):
    """Over episodes on end: rewards on the way, infos, flags; numbers are Python's."""
    keywords = {"prompts": "shapes-location", "output": "numpy", "autoreset_mode": "Disabled"}
    vector = kind.kind(make_env(1, reward=scored, **keywords), **arguments(kind, "vector"))
    single, rewards = wrapped(kind), []
    assert single.observation_space == vector.single_observation_space
    for seed in (3, 4, None):
        compare(single.reset(seed=seed), vector.reset(seed=seed))
        for step in range(getattr(vector, "horizon", T)):
            action = actions(step, 1)
            results, wanted = single.step(action[0]), vector.step(action)
            compare(results[::4], wanted[::4])
            _, reward, terminated, truncated, _ = results
            assert type(reward) is float and type(terminated) is type(truncated) is bool
            assert reward == pytest.approx(wanted[1][0], rel=1e-5, abs=1e-6)
            assert (terminated, truncated) == (wanted[2][0], wanted[3][0])
            rewards.append(reward)
        assert terminated and results[0] in single.observation_space
    assert np.count_nonzero(rewards) >= 3


def compare(results, wanted):
    """An observation and an info of a single environment with those of a vector of one."""
    for one, batch in zip(results, wanted, strict=True):
        assert one.keys() == {key for key in batch if key[0] != "_"}
        for key, value in one.items():
            if isinstance(value, dict):
                compare([value], [batch[key]])
            elif isinstance(value, str):
                assert value == batch[key][0]
            else:
                assert isinstance(value, np.ndarray | float | int)
                np.testing.assert_allclose(value, batch[key][0], rtol=1e-5, atol=1e-6)


def test_recordings_are_those_of_the_vector_wrapper(wrapped, arguments, make_env, actions, tmp_path):
    keywords = {"reward": scored, "prompts": "shapes-location", "autoreset_mode": "Disabled", "output": "numpy"}
    vector = ours.RecordPicturesVectorEnv(make_env(1, **keywords), **arguments(ours.RecordPictures, "vector"))
    for env, number in ((vector, slice(None)), (wrapped(ours.RecordPictures), 0)):
        for seed in (3, 4, 5):
            env.reset(seed=seed)
            for step in range(T):
                env.step(actions(step, 1)[number])
    files = sorted(path.name for path in (tmp_path / "vector").iterdir())
    assert len(files) == 3 and files == sorted(path.name for path in (tmp_path / "single").iterdir())
    assert all((tmp_path / "vector" / name).read_bytes() == (tmp_path / "single" / name).read_bytes() for name in files)


@pytest.mark.parametrize("kind", KINDS)
def test_it_passes_gymnasiums_checker(kind, wrapped, make_bare):
    """Which says of every wrapper that it is one, and of an environment without a spec that it has none."""
    with pytest.warns() as caught:
        check_env(wrapped(kind, make_bare()))
    first, second = (str(warning.message) for warning in caught)
    assert "is different from the unwrapped version" in first and "not having a spec" in second


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_a_wrapper_of_gymnasium(kind, wrapped, make_single):
    env = make_single(render_mode="rgb_array", num_inference_steps=1)
    view = wrapped(kind, env)
    assert isinstance(view, gym.Wrapper) and view.env is env and view.unwrapped is env.unwrapped
    assert (view.render_mode, view.metadata) == (env.render_mode, env.metadata)
    assert view.spec.additional_wrappers[-1].name == kind.__name__
    observation, info = view.reset(seed=5)
    assert view.np_random is env.np_random and view.np_random_seed == 5
    assert view.get_wrapper_attr("vector") is view.vector and str(env) in str(view)
    np.testing.assert_array_equal(view.render(), env.render())
    view.close()
    with pytest.raises(gym.error.ClosedEnvironmentError):
        env.reset()


def test_attributes_are_the_vector_wrappers(wrapped, toy):
    """To read and to set, from a wrapper around it too; its own and private ones are its own."""
    env = wrapped(ours.KLPenalty)
    assert (env.policy, env.beta, env.estimator) == (toy, 0.25, "sampled")
    env.beta, env.own = 0.5, 1
    other = copy.copy(toy)
    assert wrappers.OrderEnforcing(env).set_wrapper_attr("policy", other)
    assert (env.vector.beta, env.vector.policy, env.get_wrapper_attr("policy")) == (0.5, other, other)
    assert not hasattr(env.vector, "own") and not hasattr(env, "num_envs")
    with pytest.raises(AttributeError, match="KLPenalty has no attribute 'police'"):
        env.police  # noqa: B018


def test_help_shows_the_arguments():
    assert list(inspect.signature(ours.KLPenalty).parameters) == ["env", "policy", "beta", "estimator"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrapper_of_gymnasium_below_is_seen(kind, wrapped, make_single, actions):
    """And one above sees what ours returns."""
    below = wrappers.TransformReward(make_single(reward=scored, num_inference_steps=1), lambda reward: 100 * reward)
    rewards = []
    for env in (below, wrappers.RecordEpisodeStatistics(wrapped(kind, below))):
        env.reset(seed=1)
        rewards.append(env.step(actions(0, 1)[0]))
    plain, (_, reward, terminated, _, info) = rewards[0][1], rewards[1]
    assert plain > 1000 and terminated and abs(reward) > 500
    assert (info["episode"]["l"], info["episode"]["r"]) == (1, pytest.approx(reward))


def test_ours_compose(make_single, toy, actions, tmp_path):
    """Recorded raw, normalised, previewed and penalised: each sees what it should."""
    env = make_single(reward=scored)
    prompt = env.reset(seed=0)[1]["prompt"]
    plain = [env.step(actions(step, 1)[0])[1] for step in range(T)][-1]
    env = ours.PromptNormalization(ours.RecordPictures(env, tmp_path), Witness())
    env = ours.KLPenalty(ours.PreviewReward(env, toy), toy, 0.1)
    start = env.reset(seed=0)[1]["preview"]
    steps = [env.step(actions(step, 1)[0]) for step in range(T)]
    kl = sum(info["kl"] for *_, info in steps)
    assert sum(reward for _, reward, *_ in steps) == pytest.approx(2 * plain + 1 - start - 0.1 * kl, rel=1e-5)
    (line,) = (tmp_path / "pictures.jsonl").read_text().splitlines()
    assert (json.loads(line)["prompt"], json.loads(line)["reward"]) == (prompt, pytest.approx(plain))


@pytest.mark.parametrize("kind", [ours.OneStep, ours.RecordPictures])
def test_its_spec_makes_it_again(kind, make_single, arguments, actions):
    env = kind(make_single(reward="Incompressibility"), *arguments(kind).values())
    again = gym.make(EnvSpec.from_json(env.spec.to_json()))
    assert isinstance(again, kind)
    if kind is ours.RecordPictures:
        assert (again.recorder.folder, again.recorder.every) == (env.recorder.folder, 2)
    rewards = []
    for each in (env, again):
        each.reset(seed=2)
        rewards.append(each.step(actions(0, 1)[0])[1])
    assert rewards[0] == rewards[1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_calls_is_kept(kind, wrapped, actions):
    env, action = wrapped(kind, num_inference_steps=1), actions(0, 1)[0]
    with pytest.raises(gym.error.ResetNeeded, match="reset"):
        env.step(action)
    env.reset(seed=0)
    for bad in (action[None], action.astype(np.float64), [0.0], 5):
        with pytest.raises(ValueError, match="^action"):
            env.step(bad)
    first = env.step(action)[1]
    with pytest.raises(gym.error.ResetNeeded, match="are over; reset them first"):
        env.step(action)
    env.reset(seed=0)
    assert env.step(torch.from_numpy(action))[1] == first


@pytest.mark.parametrize("kind", KINDS)
def test_vector_environments_are_refused(kind, make_env, arguments):
    message = f"is not made by gym.make; for a vector environment there is {kind.__name__}VectorEnv"
    for env in (make_env(1), None):
        with pytest.raises(ValueError, match=message):
            kind(env, **arguments(kind))
