"""`deferred_rewards`: the scores come later, in a future."""

import threading

import pytest
import torch
from gymnasium.vector import AutoresetMode

from diffusion_gym.rewards import RewardError, RewardOutput


def scored(images, prompts, metadata):
    return RewardOutput(images.mean((1, 2, 3)), {"red": images[:, 0].mean((1, 2))})


def play(env, actions):
    for action in actions:
        result = env.step(action)
    return result


@pytest.fixture
def env(make_env):
    return make_env(3, reward=scored, num_inference_steps=2, autoreset_mode="Disabled")


@pytest.fixture
def actions():
    return torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))


def test_the_step_gives_nothing_and_the_future_what_it_would_have_given(env, actions):
    env.reset(seed=0)
    _, rewards, _, _, infos = play(env, actions)
    with env.deferred_rewards() as scores:
        env.reset(seed=0)
        _, none, ended, _, later = play(env, actions)
        output = scores[0].result(30)
    assert len(scores) == 1 and ended.all()
    assert none.tolist() == [0, 0, 0] and later["reward_components"] == {}
    assert torch.equal(later["image"], infos["image"])
    assert torch.equal(output.scores, rewards) and rewards.all()
    assert torch.equal(output.info["red"], infos["reward_components"]["red"])


def test_afterwards_rewards_come_with_the_step_again(env, actions):
    with env.deferred_rewards():
        pass
    env.reset(seed=0)
    assert play(env, actions)[1].all()


def test_episodes_that_end_apart_have_futures_of_their_own(env, actions):
    with env.deferred_rewards() as scores:
        env.reset(seed=0)
        play(env, actions)
        mask = torch.tensor([True, False, True])
        with pytest.raises(Exception, match="reset them first"):
            env.step(actions[0])
        env.reset(options={"reset_mask": mask})
        env.reset(options={"reset_mask": ~mask})
        play(env, actions)
        assert [future.result(30).scores.shape for future in scores] == [(3,), (3,)]


def test_an_error_is_in_the_future(make_env, actions):
    def failing(images, prompts, metadata):
        raise ValueError("no")

    env = make_env(3, reward=failing, num_inference_steps=2, autoreset_mode="Disabled")
    with env.deferred_rewards() as scores:
        env.reset(seed=0)
        play(env, actions)
        with pytest.raises(RewardError, match="raised ValueError: no"):
            scores[0].result(30)


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
def test_environments_that_reset_by_themselves_refuse(make_env, mode):
    env = make_env(2, autoreset_mode=mode)
    with pytest.raises(ValueError, match=f"autoreset_mode='{mode.value}' gives the reward with the last step"):
        with env.deferred_rewards():
            pass


def test_a_reward_that_still_runs_when_the_context_is_left_is_waited_for(make_env, actions):
    """Then a second context, and a step without one: never two threads in the reward."""
    entered, gate, inside, most = threading.Event(), threading.Event(), [], []

    def slow(images, prompts, metadata):
        inside.append(1)
        most.append(len(inside))
        entered.set()
        assert gate.wait(30)
        inside.pop()
        return images.mean((1, 2, 3))

    env = make_env(3, reward=slow, num_inference_steps=2, autoreset_mode="Disabled")
    with env.deferred_rewards():
        env.reset(seed=0)
        play(env, actions)
        assert entered.wait(30)
    with env.deferred_rewards() as scores:
        env.reset(seed=0)
        play(env, actions)
        threading.Timer(0.2, gate.set).start()
        assert scores[0].result(30).scores.all()
    env.reset(seed=0)
    assert play(env, actions)[1].all()
    assert most == [1, 1, 1]


def test_a_reward_that_writes_into_its_pictures_leaves_the_recorded_ones(make_env, actions):
    def writing(images, prompts, metadata):
        images.zero_()
        return torch.ones(len(images))

    recorded = []
    for reward in (scored, writing):
        env = make_env(3, reward=reward, num_inference_steps=2, autoreset_mode="Disabled")
        env.reset(seed=0)
        recorded.append(play(env, actions)[-1]["image"])
        with env.deferred_rewards() as scores:
            env.reset(seed=0)
            recorded.append(play(env, actions)[-1]["image"])
            scores[0].result(30)
    assert recorded[0].any() and all(torch.equal(images, recorded[0]) for images in recorded[1:])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_autoencoder_that_overflows_pays_nan(make_env, actions, monkeypatch, value):
    env = make_env(3, reward=scored, num_inference_steps=2, autoreset_mode="Disabled")
    env.reset(seed=0)
    _, wanted, *_ = play(env, actions)
    decode = env.unwrapped.model.vae.decode

    def overflowing(latents, return_dict):
        (images,) = decode(latents, return_dict=return_dict)
        images = images.clone()
        images[1, :, 2, 2] = value
        return (images,)

    monkeypatch.setattr(env.unwrapped.model.vae, "decode", overflowing)
    env.reset(seed=0)
    with pytest.warns(UserWarning, match="1 of 3 pictures hold NaN"):
        _, rewards, _, _, infos = play(env, actions)
    assert rewards[1].isnan() and infos["reward_components"]["red"][1].isnan()
    assert torch.equal(rewards[[0, 2]], wanted[[0, 2]])
