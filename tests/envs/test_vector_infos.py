"""What the vector environment's infos hold, its pictures, and Gymnasium's wrappers around it."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.wrappers.vector import DictInfoToList, RecordEpisodeStatistics

from diffusion_gym.images import to_uint8
from episodes import to_the_end, zeros

SHAPE = (4, 4, 4)


# --- infos and rendering ---------------------------------------------------------------------------------------------


def test_info_of_the_last_step_has_picture_and_components(make_env):
    env = make_env(3, reward="Compressibility", output="numpy", autoreset_mode="Disabled")
    env.reset(seed=0)
    for _ in range(3):
        assert env.step(zeros(env))[4].keys() == {"prompt", "_prompt"}
    _, rewards, _, _, infos = env.step(zeros(env))
    assert infos["image"].dtype == np.uint8 and infos["image"].shape == (3, 8, 8, 3)
    np.testing.assert_array_equal(infos["image"], to_uint8(env.unwrapped.model.decode(torch.zeros(3, *SHAPE))).numpy())
    np.testing.assert_array_equal(infos["reward_components"]["jpeg_kb"], -rewards)
    assert (rewards < 0).all()
    for mask in (infos["_image"], infos["_reward_components"], infos["reward_components"]["_jpeg_kb"]):
        assert mask.tolist() == [True] * 3


def test_info_belongs_to_the_ended_alone(make_env):
    env = make_env(3, reward="Compressibility", output="numpy", autoreset_mode="Disabled")
    env.reset(seed=0)
    env.step(zeros(env))
    env.reset(options={"reset_mask": np.array([True, False, False])})
    for _ in range(3):
        infos = env.step(zeros(env))[4]
    assert infos["_image"].tolist() == [False, True, True]
    assert infos["reward_components"]["_jpeg_kb"].tolist() == [False, True, True]
    assert (infos["reward_components"]["jpeg_kb"] > 0).tolist() == [False, True, True]
    assert infos["_prompt"].tolist() == [True] * 3


def test_same_step_moves_picture_and_prompt_to_final_info(make_env):
    env = make_env(3, output="numpy")
    env.reset(seed=0, options={"prompt": "a yellow star"})
    for _ in range(4):
        infos = env.step(zeros(env))[4]
    assert list(infos["final_info"]["prompt"]) == ["a yellow star"] * 3
    assert infos["final_info"]["image"].shape == (3, 8, 8, 3)
    assert "a yellow star" not in infos["prompt"] and "image" not in infos


def test_render_decodes_the_present_latents(make_env):
    env = make_env(2, render_mode="rgb_array", output="numpy")
    env.reset(seed=0)
    observation, *_ = env.step(np.random.default_rng(0).standard_normal((2, *SHAPE), dtype=np.float32))
    frames = env.render()
    assert isinstance(frames, tuple) and [frame.shape for frame in frames] == [(8, 8, 3)] * 2
    wanted = to_uint8(env.unwrapped.model.decode(torch.from_numpy(observation["latents"]))).numpy()
    np.testing.assert_array_equal(np.stack(frames), wanted)


def test_render_needs_a_mode_and_a_reset(make_env):
    with pytest.warns(UserWarning, match="without a render mode gives None"):
        assert make_env(2).render() is None
    with pytest.raises(gym.error.ResetNeeded, match="reset"):
        make_env(2, render_mode="rgb_array").render()


# --- Gymnasium's wrappers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["SameStep", "NextStep"])
def test_record_episode_statistics_works(make_env, mode):
    env = RecordEpisodeStatistics(make_env(3, output="numpy", autoreset_mode=mode))
    env.reset(seed=0)
    returns, lengths = [], []
    for _ in range(10):
        _, rewards, terminations, _, infos = env.step(zeros(env))
        if terminations.any():
            np.testing.assert_array_equal(infos["_episode"], terminations)
            np.testing.assert_allclose(infos["episode"]["r"], rewards)
            returns += infos["episode"]["r"].tolist()
            lengths += infos["episode"]["l"].tolist()
    assert lengths == [4] * 6
    assert list(env.return_queue) == returns and env.episode_count == 6


def test_record_episode_statistics_takes_partial_resets(make_env):
    env = RecordEpisodeStatistics(make_env(2, output="numpy", autoreset_mode="Disabled"))
    env.reset(seed=0)
    env.step(zeros(env))
    env.reset(options={"reset_mask": np.array([True, False])})
    for _ in range(3):
        infos = env.step(zeros(env))[4]
    assert infos["_episode"].tolist() == [False, True] and infos["episode"]["l"].tolist() == [0, 4]


def test_dict_info_to_list_works(make_env):
    env = DictInfoToList(make_env(2, reward="Compressibility", output="numpy", autoreset_mode="Disabled"))
    _, *_, infos = to_the_end(env)
    assert [info["image"].shape for info in infos] == [(8, 8, 3)] * 2
    assert all(info["reward_components"]["jpeg_kb"] > 0 for info in infos)
