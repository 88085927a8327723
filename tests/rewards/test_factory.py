"""`make_reward`: names, addresses, modules, sums and callables."""

import sys

import pytest
import torch

from diffusion_gym.rewards import REWARDS, default_prompts, evaluate, make_reward
from diffusion_gym.rewards.weighted import WeightedSum

IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "b", "c"]
SOURCE = """
import missing_on_demand
from math import floor

number = 3


def red(images, prompts, metadata, *, scale=1.0):
    return scale * images[:, 0].mean((1, 2))


class Channel:
    def __init__(self, channel=0):
        self.channel = channel

    def __call__(self, images, prompts, metadata):
        return images[:, self.channel].mean((1, 2))


class Silent:
    pass


ready = Channel(1)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module in the current directory, which Python's path does not hold."""
    name = "rewards_of_a_user"
    (tmp_path / f"{name}.py").write_text(SOURCE.replace("import missing_on_demand\n", ""))
    (tmp_path / "broken_rewards.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    yield name
    sys.modules.pop(name, None)


def scores(reward):
    return evaluate(reward, IMAGES, PROMPTS).scores


def test_a_function_is_the_reward(module):
    assert torch.equal(scores(make_reward(f"{module}:red")), IMAGES[:, 0].mean((1, 2)))


def test_keywords_go_with_each_call_of_a_function(module):
    reward = make_reward(f"{module}:red", scale=3.0)
    assert torch.equal(scores(reward), 3 * IMAGES[:, 0].mean((1, 2))) and reward.name == "red"
    with pytest.raises(TypeError, match=f"{module}:red.*reward_kwargs=.'scael': 2.*scael"):
        make_reward(f"{module}:red", scael=2)


def test_a_class_is_built_with_the_keywords(module):
    assert torch.equal(scores(make_reward(f"{module}:Channel", channel=2)), IMAGES[:, 2].mean((1, 2)))
    assert torch.equal(scores(make_reward(f"{module}:ready")), IMAGES[:, 1].mean((1, 2)))
    with pytest.raises(TypeError, match="chanel"):
        make_reward(f"{module}:Channel", chanel=2)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module:red", "cannot be imported .*no_such_module.*PYTHONPATH"),
        ("broken_rewards:red", "cannot be imported .*missing_on_demand"),
        ("{}:rde", "did you mean '{}:red'"),
        ("{}:number", "is int, not callable"),
        ("{}:Silent", "is Silent, not callable"),
        ("{}:", "must be module:attribute"),
        ("a b:c", "must be module:attribute"),
        ("Aesthetics", "did you mean 'Aesthetic'"),
        ("Compresibility", "did you mean 'Compressibility'"),
    ],
)
def test_what_is_wrong_with_a_name(module, name, words):
    with pytest.raises(ValueError, match=words.format(module)):
        make_reward(name.format(module))


def test_a_callable_passes_through():
    def mine(images, prompts, metadata):
        return images.mean((1, 2, 3))

    assert make_reward(mine) is mine
    with pytest.raises(ValueError, match="goes with a reward's name, not with a callable"):
        make_reward(mine, scale=2)
    with pytest.raises(ValueError, match="reward=3 is neither a name nor a callable"):
        make_reward(3)


@pytest.mark.parametrize("source", [{"Compressibility": 1.0, "Incompressibility": -0.5}, "string"])
def test_a_sum_as_mapping_and_as_string(source):
    source = "Compressibility=1, Incompressibility=-.5" if source == "string" else source
    reward = make_reward(source)
    assert isinstance(reward, WeightedSum)
    kb = evaluate(make_reward("Incompressibility"), IMAGES, PROMPTS).scores
    torch.testing.assert_close(scores(reward), -1.5 * kb)


def test_parts_of_a_sum_may_come_from_anywhere(module):
    def green(images, prompts, metadata):
        return images[:, 1].mean((1, 2))

    reward = make_reward({f"{module}:red": 1, green: 10}, keywords={f"{module}:red": {"scale": 2.0}})
    torch.testing.assert_close(scores(reward), 2 * IMAGES[:, 0].mean((1, 2)) + 10 * IMAGES[:, 1].mean((1, 2)))
    assert set(evaluate(reward, IMAGES, PROMPTS).info) == {"red", "green"}


@pytest.mark.parametrize(
    ("source", "kwargs", "words"),
    [
        ("Compressibility=", {}, "each reward once with its weight"),
        ("=1", {}, "each reward once with its weight"),
        ("Compressibility=1,Compressibility=2", {}, "each reward once"),
        ("Compressibility=1,", {}, "each reward once"),
        ("Compressibility=nan", {}, "weight=nan of reward 'Compressibility' must be a finite number"),
        ({}, {}, "at least one reward"),
        ({"Compressibility": "much"}, {}, "weight='much'"),
        ("Compresibility=1", {}, "did you mean 'Compressibility'"),
        ("Color=1", {"keywords": {"Colour": {}}}, "keywords='Colour' is unknown; did you mean 'Color'"),
    ],
)
def test_what_is_wrong_with_a_sum(source, kwargs, words):
    with pytest.raises(ValueError, match=words):
        make_reward(source, **kwargs)


def test_two_parts_of_one_name_are_refused():
    def same(images, prompts, metadata):
        return images.mean((1, 2, 3))

    other, other.__name__ = (lambda *arguments: same(*arguments)), "same"
    with pytest.raises(ValueError, match="two rewards named 'same'"):
        make_reward({same: 1, other: 1})


def test_prompts_are_those_of_the_reward_or_of_the_first_part_that_has_some():
    for source, expected in [
        ("Color", "shapes-color"),
        ("Compressibility=1,Count=1,Color=1", "shapes-count"),
        ({"Color": 1.0}, "shapes-color"),
        ("Compressibility=1", None),
    ]:
        assert default_prompts(source, make_reward(source)) == expected
    assert default_prompts(len, len) is None
    assert REWARDS.default_prompts("Count") == "shapes-count"


def test_an_environment_takes_a_sum(make_env):
    env = make_env(2, reward={"Compressibility": 1.0, "Incompressibility": 3.0}, num_inference_steps=1)
    observation, _ = env.reset(seed=0)
    _, rewards, _, _, infos = env.step(observation["latents"])
    parts = infos["final_info"]["reward_components"]
    torch.testing.assert_close(rewards, 2 * parts["Incompressibility/jpeg_kb"])
    assert torch.equal(parts["Compressibility"], -parts["Incompressibility"])


@pytest.mark.parametrize(
    ("source", "kwargs", "words"),
    [
        ("Color", {"strct": 1}, "reward='Color': reward_kwargs='strct' is unknown; did you mean 'strict'"),
        ("Color", {"family": "count"}, "reward_kwargs='family' is unknown"),
        ("CLIPScore", {"clipp": "x"}, "did you mean 'clip'.*known: clip, prefix, dtype, device, batch_size"),
        ("Compressibility", {"sign": 1}, "reward_kwargs='sign': it takes no keywords"),
        ("Color=1,Count=2", {"strict": True}, "strict' is unknown.*keywords={'Color': {...}}"),
        ({"Count": 1}, {"strict": True}, "keywords={'Count': {...}}"),
        ("Color=1", {"keywords": {"Color": {"strct": True}}}, "did you mean 'strict'"),
        ("http://127.0.0.1:9", {"tokn": "x"}, "did you mean 'token'.*own keywords .*serve-reward"),
        ("{}:Channel", {"chanel": 2}, "did you mean 'channel'"),
    ],
)
def test_a_misspelt_keyword_is_named_before_anything_is_built(module, source, kwargs, words):
    source = source.format(module) if isinstance(source, str) else source
    with pytest.raises(TypeError, match=words):
        make_reward(source, **kwargs)
