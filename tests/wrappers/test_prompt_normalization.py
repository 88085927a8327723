"""Per-prompt normalisation: the right rewards reach the statistics, with the prompts that they belong to."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from diffusion_gym.agents.advantages import PromptStatistics
from diffusion_gym.testing.conformance import check_vector_env
from diffusion_gym.wrappers import (
    KLPenalty,
    KLPenaltyVectorEnv,
    PreviewRewardVectorEnv,
    PromptNormalization,
    PromptNormalizationVectorEnv,
    RecordPicturesVectorEnv,
)

NUMBER, T = 3, 4


def length(images, prompts, metadata):
    """Tells prompts apart by whole numbers."""
    return torch.tensor([float(len(prompt)) for prompt in prompts])


class Witness:
    """Notes what it is asked; its answer is 2 r + 1."""

    def __init__(self):
        self.asked = []

    def normalize(self, prompts, rewards):
        self.asked.append((list(prompts), rewards.tolist()))
        return 2 * rewards + 1


class Identity:
    """Without a memory, so that environments can be compared."""

    def normalize(self, prompts, rewards):
        return rewards


def reset_first(env):
    return env.reset(options={"reset_mask": np.array([True] + [False] * (env.num_envs - 1))})


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("output", ["numpy", "torch"])
def test_finished_pictures_are_normalised_with_their_own_prompts(make_env, play, mode, output):
    """Env 0 is a step behind: two groups end apart, and what has not ended keeps its 0."""
    witness = Witness()
    env = make_env(NUMBER, reward=length, prompts="shapes-location", autoreset_mode=mode, output=output)
    env = PromptNormalizationVectorEnv(env, witness)
    steps = T if mode == AutoresetMode.DISABLED else T + 1
    played = play(env, steps, seed=3, after=reset_first)
    # played: reset, step 1, reset of env 0, steps 2, 3, 4, and 5 where the mode goes on
    starts = [*played[2].infos["prompt"][:1], *played[0].infos["prompt"][1:]]
    groups = [starts[1:], starts[:1]] if steps > T else [starts[1:]]
    assert witness.asked == [(group, [float(len(prompt)) for prompt in group]) for group in groups]
    assert played[5].rewards.tolist() == [0, *(2 * len(prompt) + 1 for prompt in starts[1:])]
    if steps > T:
        assert played[6].rewards.tolist() == [2 * len(starts[0]) + 1, 0, 0]
    assert not any(now.rewards.any() for now in (played[1], *played[3:5]))


@pytest.mark.parametrize("output", ["numpy", "torch"])
def test_rewards_keep_their_container(make_env, output):
    env = PromptNormalizationVectorEnv(make_env(2, num_inference_steps=1, output=output), Witness())
    observation, _ = env.reset(seed=0)
    rewards = env.step(observation["latents"])[1]
    assert rewards.dtype is torch.float32 if output == "torch" else rewards.dtype == np.float32
    assert (rewards > 1).all()


def test_rewards_get_zero_mean_and_unit_deviation_by_prompt(make_env, actions):
    """Eight episodes of two prompts against NumPy's mean and deviation of all rewards of a prompt so far."""
    prompts = ["a red circle", "two blue stars"]
    env = make_env(4, num_inference_steps=1, prompts=prompts, output="numpy", reward="Incompressibility")
    env = PromptNormalizationVectorEnv(env, PromptStatistics(buffer_size=64, min_count=4))
    plain = make_env(4, num_inference_steps=1, output="numpy", reward="Incompressibility")
    seen = {prompt: [] for prompt in prompts}
    for step in range(8):
        mixed = [prompts[0], prompts[1], prompts[1], prompts[0]]
        env.reset(seed=0, options={"prompt": mixed})
        plain.reset(seed=0)
        rewards, raw = env.step(actions(step, 4))[1], plain.step(actions(step, 4))[1].astype(np.float64)
        for prompt, value in zip(mixed, raw, strict=True):
            seen[prompt].append(value)
        if step == 0:
            wanted = (raw - raw.mean()) / raw.std()
        else:
            wanted = [(r - np.mean(seen[p])) / np.std(seen[p]) for p, r in zip(mixed, raw, strict=True)]
        np.testing.assert_allclose(rewards, wanted, rtol=1e-4, atol=1e-6)


def test_failed_rewards_stay_and_do_not_count(make_env):
    def reward(images, prompts, metadata):
        return torch.tensor([1.0, float("nan"), float("inf")])[: len(images)]

    witness = Witness()
    env = PromptNormalizationVectorEnv(
        make_env(3, num_inference_steps=1, reward=reward, output="numpy", autoreset_mode="Disabled"), witness
    )
    observation, infos = env.reset(seed=0)
    rewards = env.step(observation["latents"])[1]
    np.testing.assert_array_equal(rewards, [3, np.nan, np.inf])
    assert witness.asked == [([infos["prompt"][0]], [1.0])]


def test_the_single_one_normalises_the_end_alone(make_single, actions):
    witness = Witness()
    env = PromptNormalization(make_single(reward=length), witness)
    for seed in (1, 2):
        prompt = env.reset(seed=seed)[1]["prompt"]
        rewards = [env.step(actions(step, 1)[0])[1] for step in range(T)]
        assert rewards == [0, 0, 0, 2 * len(prompt) + 1] and all(isinstance(reward, float) for reward in rewards)
        assert witness.asked[-1] == ([prompt], [len(prompt)])
    assert len(witness.asked) == 2


def test_it_conforms(make_env):
    check_vector_env(lambda **kinds: PromptNormalizationVectorEnv(make_env(num_inference_steps=2, **kinds), Identity()))


def test_with_the_kl_penalty_around_it_the_penalty_is_not_normalised(make_env, toy, play):
    """The order of RLHF: r is normalised, then beta KL_t is taken off."""
    inner = PromptNormalizationVectorEnv(make_env(NUMBER, reward=length), Witness())
    played = play(KLPenaltyVectorEnv(inner, toy, 0.5), T)
    prompts = played[0].infos["prompt"]
    wanted = [2 * len(prompt) + 1 for prompt in prompts] - 0.5 * sum(now.infos["kl"] for now in played[1:])
    np.testing.assert_allclose(sum(now.rewards for now in played[1:]), wanted, rtol=1e-5)


# --- misuse ----------------------------------------------------------------------------------------------------


def test_rewards_on_the_way_are_refused(make_env, make_single, toy, tmp_path):
    """Also through a wrapper in between."""
    for name, env in (
        ("KLPenalty", RecordPicturesVectorEnv(KLPenaltyVectorEnv(make_env(1), toy, 1), tmp_path)),
        ("PreviewReward", PreviewRewardVectorEnv(make_env(1), toy)),
    ):
        with pytest.raises(ValueError, match=f"rewards before the last step; put {name} around"):
            PromptNormalizationVectorEnv(env, Witness())
    with pytest.raises(ValueError, match="rewards before the last step; put KLPenalty around"):
        PromptNormalization(gym.wrappers.OrderEnforcing(KLPenalty(make_single(), toy, 1)), Witness())


def test_statistics_without_normalize_are_refused(make_env):
    with pytest.raises(TypeError, match=r"statistics=None has no normalize\(prompts, rewards\)"):
        PromptNormalizationVectorEnv(make_env(1), None)
