"""What an iteration costs, counted: prompts drawn, rewards looked at, bytes kept. Nothing here looks at a clock."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from diffusion_gym.agents.advantages import (
    AdvantageOptions,
    PromptStatistics,
    RewardNormalizer,
    rows_by_prompt,
    softmax_weights,
    threshold_weights,
    usable_counts,
)
from diffusion_gym.agents.algorithms import RWR
from diffusion_gym.agents.diversity import by_prompt
from diffusion_gym.agents.rollout import collect_many
from diffusion_gym.prompts import make_prompts


class Counting(Sequence):
    """Some values, and how often one was looked at."""

    def __init__(self, values):
        self.values, self.looks = values, 0

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        self.looks += 1
        return self.values[index]

    def __iter__(self):
        for value in self.values:
            self.looks += 1
            yield value


# --- prompts ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large_file(tmp_path_factory):
    """A prompt file of 100,000 lines."""
    path = tmp_path_factory.mktemp("prompts") / "many.txt"
    path.write_text("\n".join(f"a red circle number {number}" for number in range(100_000)))
    return str(path)


@pytest.mark.parametrize("group_size", [1, 4])
def test_a_draw_of_a_large_file_looks_at_one_prompt(make_env, make_policy, large_file, group_size):
    env = make_env(8, prompts=large_file, autoreset_mode=AutoresetMode.DISABLED)
    policy, prompts = make_policy(env), env.unwrapped.prompt_set
    assert len(prompts.prompts) == 100_000
    counted = Counting(prompts.prompts)
    object.__setattr__(prompts, "prompts", counted)
    rolled = collect_many(env, policy, 16, (0, 0), group_size=group_size)
    drawn = 16 if group_size == 1 else 16 + 16 // group_size  # with groups, what each env would draw is drawn too
    assert counted.looks == drawn and len(set(rolled.prompts)) == 16 // group_size


def test_a_large_file_is_read_once_line_by_line(large_file, monkeypatch):
    from diffusion_gym.prompts import files

    opened, read = [], files._read
    monkeypatch.setattr(files, "_read", lambda *given: (opened.append(1), read(*given))[1])
    drawn = make_prompts(large_file)
    rng = np.random.default_rng(0)
    assert len({drawn.draw(rng) for _ in range(50)}) > 45 and opened == [1]


# --- statistics ------------------------------------------------------------------------------------------------

NUMBER = 2_000
RULES = {
    "statistics": lambda prompts, rewards: PromptStatistics().normalize(prompts, rewards),
    "normaliser": lambda prompts, rewards: RewardNormalizer(AdvantageOptions()).normalize(prompts, rewards),
    "softmax": lambda prompts, rewards: softmax_weights(prompts, rewards, 0.2),
    "threshold": lambda prompts, rewards: threshold_weights(prompts, rewards, 0.9),
    "counts": usable_counts,
    "rows": lambda prompts, rewards: sum(map(list, rows_by_prompt(prompts).values()), []),
    "diversity": lambda prompts, rewards: [by_prompt(rewards[:, None] ** [0, 1], prompts)] * NUMBER,
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("distinct", [1, 50, NUMBER])
def test_statistics_by_prompt_look_at_each_sample_a_few_times(rule, distinct):
    prompts = Counting([f"prompt {number % distinct}" for number in range(NUMBER)])
    values = rule(prompts, np.random.default_rng(0).normal(size=NUMBER))
    assert len(values) == NUMBER and prompts.looks <= 4 * NUMBER


# --- pictures --------------------------------------------------------------------------------------------------


def device_bytes(rolled):
    """What a rollout keeps on its device for good, a picture: everything but the pictures and the embeddings."""
    tensors = [rolled.tokens, rolled.latents, rolled.log_probs, rolled.rewards]
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage() for part in tensors}
    return sum(storage.nbytes() for storage in storages.values()) / len(rolled)


def test_finished_pictures_keep_their_latents_once_and_nothing_of_their_steps(make_env, make_agent, monkeypatch):
    env = make_env(4, autoreset_mode=AutoresetMode.DISABLED)
    agent, joined, cat = make_agent(env, agent=RWR), [], torch.cat
    latent = 4 * np.prod(env.unwrapped.model.latent_shape)

    def recorded(tensors, *axis, **keywords):
        joined.extend(tuple(tensor.shape) for tensor in tensors)
        return cat(tensors, *axis, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "cat", recorded)
        rolled = agent.sample(env, 16, (0, 0))
    tokens = 8 * rolled.tokens.shape[1]
    assert rolled.latents.shape[:2] == (1, 16) and rolled.log_probs.shape == (0, 16)
    assert device_bytes(rolled) == latent + tokens + 4  # the reward
    assert (4, 8, 8, 3) in joined  # the pictures of each batch
    assert (1, 4, *env.unwrapped.model.latent_shape) not in joined  # their latents would be there twice


def test_ten_thousand_pictures_of_512_pixels_need_less_than_a_gigabyte():
    """Of RWR's rollout in the paper: latents, tokens and rewards, and the embeddings that may stay there."""
    from diffusion_gym.agents.embeddings import DEVICE_BYTES

    latents, tokens, reward = 4 * 4 * 64 * 64, 8 * 77, 4
    assert 10_000 * (latents + tokens + reward) + DEVICE_BYTES < 1e9


def test_memory_is_refused_for_what_is_kept(make_env, make_agent, monkeypatch):
    from diffusion_gym.agents import rollout

    asked = []
    monkeypatch.setattr(rollout, "require_memory", lambda what, numbers, *_: asked.append(numbers))
    env = make_env(4, autoreset_mode=AutoresetMode.DISABLED)
    one, agent = np.prod(env.unwrapped.model.latent_shape), make_agent(env, agent=RWR)
    agent.sample(env, 8, (0, 0))
    collect_many(env, agent.policy, 8, (0, 0))
    assert asked == [8 * one, 8 * one * (env.unwrapped.horizon + 1)]
