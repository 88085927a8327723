"""What a prompt set says of a prompt besides its text, on its way through the environments to the reward."""

import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.wrappers.vector import DictInfoToList

from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.agents.rollout import collect_many
from diffusion_gym.agents.training.denoised_path import denoised_path
from diffusion_gym.wrappers import PreviewReward, PreviewRewardVectorEnv
from episodes import zeros

LINES = [{"prompt": f"{number} stars", "wanted": {"number": number}} for number in range(1, 9)]


class Told:
    """A reward whose score is what the metadata says; it keeps what it was told, and writes into what it gets."""

    name = "told"

    def __init__(self):
        self.seen = []

    def __call__(self, images, prompts, metadata):
        assert all(entry["wanted"]["number"] == int(prompt[0]) for prompt, entry in zip(prompts, metadata, strict=True))
        self.seen += prompts
        scores = torch.tensor([float(entry["wanted"]["number"]) for entry in metadata])
        for entry in metadata:
            entry["wanted"].clear()
        return scores


def numbers(infos):
    return [entry["wanted"]["number"] for entry in infos["metadata"]]


@pytest.mark.parametrize("mode", ["SameStep", "NextStep", "Disabled"])
def test_metadata_comes_with_its_prompt_and_reaches_the_reward(make_env, mode):
    reward = Told()
    env = make_env(3, prompts=LINES, reward=reward, autoreset_mode=mode, output="numpy")
    _, infos = env.reset(seed=0)
    assert numbers(infos) == [int(prompt[0]) for prompt in infos["prompt"]] and infos["_metadata"].all()
    for _ in range(4):
        _, rewards, _, _, infos = env.step(zeros(env))
    final = infos.get("final_info", infos)
    assert rewards.tolist() == numbers(final) == [int(prompt[0]) for prompt in final["prompt"]]
    assert final["_metadata"].all() and numbers(infos) == [int(prompt[0]) for prompt in infos["prompt"]]
    if mode == "SameStep":
        assert list(infos["prompt"]) != list(final["prompt"])
        rows = DictInfoToList(env).reset(seed=0)[1]
        assert all(row["metadata"]["wanted"]["number"] == int(row["prompt"][0]) for row in rows)


def test_the_single_environment_has_the_same(tiny_pipeline):
    keywords = {"model": str(tiny_pipeline), "prompts": LINES, "reward": Told(), "num_inference_steps": 2}
    env = gym.make("DiffusionDenoise-v0", **keywords)
    _, info = env.reset(seed=3)
    number = int(info["prompt"][0])
    assert info["metadata"] == {"wanted": {"number": number}}
    for _ in range(2):
        _, reward, _, _, info = env.step(np.zeros(env.action_space.shape, np.float32))
    assert reward == number and info["metadata"] == {"wanted": {"number": number}}


def test_a_prompt_that_is_given_has_the_metadata_of_the_set(make_env):
    env = make_env(2, prompts=LINES, reward=lambda images, prompts, metadata: [len(entry) for entry in metadata])
    _, infos = env.reset(seed=0, options={"prompt": ["3 stars", "a stranger"]})
    assert infos["metadata"].tolist() == [{"wanted": {"number": 3}}, {}]
    for _ in range(4):
        _, rewards, *_ = env.step(zeros(env))
    assert rewards.tolist() == [1, 0]


def needy(images, prompts, metadata, scale=1.0):
    return [scale * len(entry["text"]) for entry in metadata]


needy.needs_metadata = ("text",)
SIGNS = [{"prompt": "a sign", "text": "CAT"}, {"prompt": "a shop", "text": "A7", "held_out": "new"}]


@pytest.mark.parametrize(
    ("reward", "keywords"),
    [
        (needy, {}),
        ({needy: 1.0, "Compressibility": 0.1}, {}),
        (needy, {"reward_seconds": 60.0}),
        (f"{__name__}:needy", {"reward_kwargs": {"scale": 2.0}}),
    ],
    ids=["function", "sum", "limited", "bound"],
)
def test_prompts_without_what_the_reward_needs_are_refused_before_the_model_is_loaded(
    reward, keywords, tiny_pipeline, monkeypatch
):
    monkeypatch.setitem(sys.modules, __name__, sys.modules[needy.__module__])
    for prompts, who in (
        (["a cat"], "'a cat' has none"),
        ([{"prompt": "a cat", "txt": "CAT"}], "'a cat' has 'txt'"),
        ([*SIGNS, {"prompt": "a hat", "held_out": "new"}], "'a hat' has none"),
    ):
        with pytest.raises(ValueError, match=f"'needy'?.* needs 'text' in the metadata of each prompt, and .*{who}"):
            gym.make_vec("DiffusionDenoise-v0", model="/nowhere", reward=reward, prompts=prompts, **keywords)
    env = gym.make_vec("DiffusionDenoise-v0", model=str(tiny_pipeline), reward=reward, prompts=SIGNS, **keywords)
    assert env.unwrapped.reward is not None


def test_a_default_prompt_set_or_a_given_prompt_without_what_the_reward_needs_is_refused(make_env):
    with pytest.raises(ValueError, match="needs 'text'.*prompts='"):
        make_env(2, reward=needy, prompts=None)
    env = make_env(2, reward=needy, prompts=SIGNS)
    before = env.reset(seed=0)[0]["latents"]
    with pytest.raises(ValueError, match=r"options\['prompt'\]: 'a stranger' has none.*\.jsonl"):
        env.reset(seed=1, options={"prompt": ["a sign", "a stranger"]})
    mask = np.array([True, False])
    env.reset(options={"prompt": ["a sign", "a stranger"], "reset_mask": mask})
    assert torch.equal(env.reset(seed=0)[0]["latents"], before)


@pytest.mark.parametrize("needs", ["text", ("text", 3), None, 1])
def test_needs_that_are_no_keys_are_refused(make_env, needs):
    class Wrong(Told):
        needs_metadata = needs

    with pytest.raises(ValueError, match="reward='told' has needs_metadata=.*; write a tuple of strings"):
        make_env(1, reward=Wrong(), prompts=SIGNS)


def test_a_set_without_metadata_has_none_in_its_infos(make_env):
    env = make_env(2)
    assert env.reset(seed=0)[1].keys() == {"prompt", "_prompt"}


@pytest.mark.parametrize("background", [False, True])
def test_rollouts_in_groups_and_their_paths_are_scored_with_metadata(make_env, background):
    reward = Told()
    reward.background = background
    env = make_env(4, prompts=LINES, reward=reward, autoreset_mode="Disabled")
    policy = DenoisingPolicy.from_env(env)
    found = collect_many(env, policy, 8, (0,), group_size=2)
    assert found.rewards.tolist() == [float(prompt[0]) for prompt in found.prompts]
    path = denoised_path(env, policy, found, 3)
    assert path.rewards.tolist() == [[float(prompt[0]) for prompt in found.prompts[:3]]] * 5


def test_previews_are_scored_with_metadata(make_env, tiny_pipeline):
    env = make_env(2, prompts=LINES, reward=Told(), autoreset_mode="Disabled")
    preview = PreviewRewardVectorEnv(env, DenoisingPolicy.from_env(env))
    _, infos = preview.reset(seed=0)
    assert infos["preview"].tolist() == [float(prompt[0]) for prompt in infos["prompt"]]
    single = gym.make("DiffusionDenoise-v0", model=str(tiny_pipeline), prompts=LINES, reward=Told())
    _, info = PreviewReward(single, DenoisingPolicy.from_env(single)).reset(seed=0)
    assert info["preview"] == int(info["prompt"][0])


def test_writing_into_the_infos_changes_no_other_episode(make_env):
    env = make_env(2, prompts=LINES[:1], reward=Told())
    _, infos = env.reset(seed=0)
    infos["metadata"][0]["more"] = 1
    assert env.reset(seed=0)[1]["metadata"].tolist() == [{"wanted": {"number": 1}}] * 2
