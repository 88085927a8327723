"""What the adapters of Stable-Baselines3 and Tianshou share."""

import gymnasium as gym
import numpy as np
import torch

from diffusion_gym.agents.adapters import info_rows, layers


def test_info_rows_follow_gymnasiums_masks():
    infos = {
        "prompt": np.array(["a", "b", "c"], dtype=object),
        "kl": torch.tensor([1.0, 2.0, 3.0], requires_grad=True),
        "_kl": np.array([True, False, True]),
        "reward_components": {"facts": np.array([4, 5, 6]), "_facts": np.array([False, True, True])},
        "_reward_components": np.array([True, True, False]),
        "image": np.zeros((3, 2, 2)),
    }
    rows = info_rows(infos, np.array([2, 0, 1]), without=("image",))
    assert rows == [
        {"prompt": "c", "kl": 3.0},
        {"prompt": "a", "kl": 1.0, "reward_components": {}},
        {"prompt": "b", "reward_components": {"facts": 5}},
    ]
    assert "image" in info_rows(infos, np.array([0]))[0]


def test_layers_are_the_wrappers_and_the_environment():
    env = gym.make_vec("CartPole-v1", num_envs=1)
    outer = gym.wrappers.vector.RecordEpisodeStatistics(wrapped := gym.wrappers.vector.ClipReward(env, 0, 1))
    assert list(layers(outer)) == [outer, wrapped, env] and list(layers(env)) == [env]
