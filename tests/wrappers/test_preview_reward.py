"""Preview rewards: potential-based, so that the return is that of the picture less a constant of its start."""

import math
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from gymnasium.vector import AutoresetMode

from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.agents.rollout import collect
from diffusion_gym.testing import conformance
from diffusion_gym.testing.conformance import RULES
from diffusion_gym.testing.random_ddpm import write_random_ddpm
from diffusion_gym.testing.random_pipeline import write_random_pipeline
from diffusion_gym.wrappers import OneStepVectorEnv, PreviewReward, PreviewRewardVectorEnv

MODES = list(AutoresetMode)
NUMBER, T = 3, 4


class Score:
    """Brightness and the length of the prompt; counts the pictures."""

    def __init__(self):
        self.pictures = 0

    def __call__(self, images, prompts, metadata):
        self.pictures += len(images)
        return images.mean((1, 2, 3)) + torch.tensor([float(len(prompt)) for prompt in prompts])


@pytest.fixture
def make(make_env):
    """`make(**keywords)` with rewards and prompts that tell environments apart."""

    def made(number=NUMBER, **keywords):
        defaults = {"reward": Score(), "prompts": "shapes-location", "output": "numpy"}
        return make_env(number, **{**defaults, **keywords})

    return made


def phi(env, observation, prompts):
    """The reward of the toy's denoised estimate x / 2, `(N,)`."""
    images = env.unwrapped.model.decode(torch.as_tensor(observation["latents"]) / 2)
    return Score()(images, list(prompts), None).numpy()


def reset_first(env):
    return env.reset(options={"reset_mask": np.array([True] + [False] * (env.num_envs - 1))})


# --- the denoised estimate ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_the_denoised_estimate_is_that_of_diffusers(make_env, moved_policy, tmp_path, prediction):
    """Thesis, equation 4.5; `pred_original_sample` of the scheduler's own step, at every step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers would like every scheduler to be Stable Diffusion's
        folder = write_random_pipeline(tmp_path / "model", prediction_type=prediction)
    env = make_env(NUMBER, model=str(folder))
    policy = moved_policy(env)
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(T)
    observation, _ = env.reset(seed=0)
    embedded = policy.embed(torch.cat([observation["prompt"], env.unwrapped.model.tokenize([""] * NUMBER)]))
    scale = policy.config.guidance_scale
    assert scale > 1
    for timestep in scheduler.timesteps:
        latents = observation["latents"]
        with torch.no_grad():
            both = policy.unet(torch.cat([latents, latents]), timestep, encoder_hidden_states=embedded).sample
        guided, unguided = both.chunk(2)
        output = unguided + scale * (guided - unguided)
        wanted = scheduler.step(output, timestep, latents).pred_original_sample
        torch.testing.assert_close(policy.denoised(observation).detach(), wanted, rtol=1e-4, atol=1e-4)
        observation, *_ = env.step(policy.distribution(observation).sample())


def test_the_denoised_estimate_is_clamped_where_the_sampler_clamps(make_env, moved_policy, tmp_path):
    folder = write_random_ddpm(tmp_path / "model")
    env = make_env(NUMBER, model=str(folder), prompts="unconditional")
    policy = moved_policy(env)
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    assert scheduler.config.clip_sample
    scheduler.set_timesteps(T)
    observation, _ = env.reset(seed=0)
    bounded = []
    for timestep in scheduler.timesteps:
        latents = observation["latents"]
        with torch.no_grad():
            wanted = scheduler.step(policy.unet(latents, timestep).sample, timestep, latents).pred_original_sample
        found = policy.denoised(observation).detach()
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        bounded.append(bool((found.abs() == 1).any()))
        observation, *_ = env.step(policy.distribution(observation).sample())
    assert any(bounded)


# --- shaping -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("every", [1, 3, 10])
@pytest.mark.parametrize("output", ["numpy", "torch"])
def test_the_return_telescopes(make, play, toy, mode, every, output):
    """Over two episodes where the mode goes on: the picture's reward less Phi(s_0), whatever happens in between."""
    steps = {AutoresetMode.SAME_STEP: 2 * T, AutoresetMode.NEXT_STEP: 2 * T + 1, AutoresetMode.DISABLED: T}[mode]
    kinds = {"autoreset_mode": mode, "output": output}
    env = make(**kinds)
    plain, played = play(env, steps, seed=2), play(PreviewRewardVectorEnv(make(**kinds), toy, every), steps, seed=2)
    first, total, ended = phi(env, plain[0].observation, plain[0].infos["prompt"]), np.zeros(NUMBER), 0
    for before, now in zip(plain[1:], played[1:], strict=True):
        assert now.rewards.dtype == np.float32
        total += now.rewards
        if before.terminations.all():
            np.testing.assert_allclose(total, before.rewards - first, rtol=1e-5, atol=1e-5)
            total[:], ended = 0, ended + 1
        if (before.observation["timestep"] == env.unwrapped.step_table.timesteps[0].item()).all():
            np.testing.assert_allclose(total, 0, atol=1e-6)
            first = phi(env, before.observation, before.infos["prompt"])
    assert ended == (1 if mode == AutoresetMode.DISABLED else 2)


@pytest.mark.parametrize("mode", MODES)
def test_each_reward_is_the_change_of_phi(make, play, toy, mode):
    """With env 0 a step behind the others, and each end on the way."""
    kinds = {"autoreset_mode": mode}
    steps = T if mode == AutoresetMode.DISABLED else 2 * T
    env = make(**kinds)
    plain = play(env, steps, after=reset_first)
    played = play(PreviewRewardVectorEnv(make(**kinds), toy), steps, after=reset_first)
    last, over = np.zeros(NUMBER), np.zeros(NUMBER, dtype=bool)
    for before, now in zip(plain, played, strict=True):
        current = phi(env, before.observation, before.infos["prompt"])
        if not hasattr(before, "rewards"):
            over &= ~before.infos["_prompt"]
            shown = before.infos["_prompt"]
        else:
            ended = before.terminations
            change = np.where(over, 0, np.where(ended, 0, current) - last)
            np.testing.assert_allclose(now.rewards, before.rewards + change, rtol=1e-5, atol=1e-5)
            shown = np.ones_like(ended) if mode == AutoresetMode.SAME_STEP else ~ended
            over = ended if mode == AutoresetMode.NEXT_STEP else np.zeros_like(ended)
        if shown.any():
            assert now.infos["_preview"].tolist() == shown.tolist()
            np.testing.assert_allclose(now.infos["preview"][shown], current[shown], rtol=1e-5)
            assert not now.infos["preview"][~shown].any()
        else:
            assert "preview" not in now.infos
        last = current


def test_the_better_of_two_ways_stays_better_by_as_much(make, toy, moved_policy):
    """The optimum is unchanged: from one start, returns of two policies differ as without previews."""
    env = make(output="torch")
    moved, pretrained = moved_policy(env), DenoisingPolicy.from_env(env)
    gaps = []
    for view in (env, PreviewRewardVectorEnv(env, toy)):
        returns = [collect(view, p, torch.Generator().manual_seed(0), seed=0).rewards for p in (moved, pretrained)]
        gaps.append(returns[0] - returns[1])
    assert (gaps[0].abs() > 1e-4).all()
    torch.testing.assert_close(gaps[1], gaps[0], rtol=0, atol=1e-5)


def test_a_denoiser_that_learns_meanwhile_changes_no_return(make, play, toy):
    generator = torch.Generator().manual_seed(0)
    toy.denoised = lambda observation: torch.as_tensor(observation["latents"]) * torch.rand(1, generator=generator)
    plain, played = play(make(), T), play(PreviewRewardVectorEnv(make(), toy), T)
    total = sum(now.rewards for now in played[1:])
    np.testing.assert_allclose(total, plain[-1].rewards - played[0].infos["preview"], rtol=1e-5, atol=1e-5)
    assert all((now.rewards != 0).all() for now in played[1:])


@pytest.mark.parametrize("every", [1, 2, 3, 4, 5])
def test_previews_cost_t_over_every_reward_queries(make, play, toy, every):
    reward = Score()
    play(PreviewRewardVectorEnv(make(reward=reward, autoreset_mode="Disabled"), toy, every), T)
    assert reward.pictures == NUMBER * (math.ceil(T / every) + 1)


def test_between_previews_nothing_is_paid(make, play, toy):
    played = play(PreviewRewardVectorEnv(make(), toy, 2), T)
    assert [bool(now.rewards.any()) for now in played[1:]] == [False, True, False, True]
    assert ["preview" in now.infos for now in played] == [True, False, True, False, True]


def test_a_preview_that_cannot_be_scored_spoils_nothing(make, play, toy):
    """NaN at the start counts as 0, later as no change."""
    calls = []

    def reward(images, prompts, metadata):
        calls.append(len(images))
        scores = Score()(images, prompts, metadata)
        return torch.full_like(scores, float("nan")) if len(calls) in (1, 3) else scores

    played = play(PreviewRewardVectorEnv(make(reward=reward, autoreset_mode="Disabled"), toy), T)
    assert played[0].infos["preview"].tolist() == [0] * NUMBER
    assert played[1].rewards.all() and not played[2].rewards.any()
    plain = play(make(autoreset_mode="Disabled"), T)
    np.testing.assert_allclose(sum(now.rewards for now in played[1:]), plain[-1].rewards, rtol=1e-5)


# --- a proper environment --------------------------------------------------------------------------------------


def test_it_conforms_but_for_the_rewards_on_the_way(make_env, toy):
    """Rounded rewards: a batch of three and one of one may differ in the last digits of their previews."""

    def reward(images, prompts, metadata):
        return (50 * Score()(images, prompts, metadata)).round()

    for rule in RULES:
        if rule is not conformance.reward_waits_for_the_end:
            rule(lambda **kinds: PreviewRewardVectorEnv(make_env(num_inference_steps=2, reward=reward, **kinds), toy))


# --- misuse ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [0, -1, 1.5, "2", True, None])
def test_every_is_checked(make, toy, every):
    with pytest.raises(ValueError, match=f"every={every!r} must be a whole number of at least 1"):
        PreviewRewardVectorEnv(make(1), toy, every)


def test_other_arguments_are_checked(make, toy):
    with pytest.raises(TypeError, match=r"denoiser=.* has no denoised\(observation\)"):
        PreviewRewardVectorEnv(make(1), object())
    for wrap, env in (
        (PreviewRewardVectorEnv, gym.make_vec("CartPole-v1", num_envs=1)),
        (PreviewRewardVectorEnv, OneStepVectorEnv(make(1))),
        (PreviewReward, gym.make("CartPole-v1")),
    ):
        with pytest.raises(ValueError, match="does not show timestep and latents"):
            wrap(env, toy)
