"""What the tests of the Tianshou adapter share."""

import numpy as np
import pytest

T = 3


@pytest.fixture
def make(make_env):
    """`make(num_envs, **keywords)`: an environment that Tianshou can reset."""

    def made(num_envs=3, **keywords):
        return make_env(num_envs, **{"num_inference_steps": T, "autoreset_mode": "Disabled", **keywords})

    return made


@pytest.fixture
def scored(make):
    """An environment of 4, and the number of pictures that its reward has seen in each call."""
    calls = []

    def counted(images, prompts, metadata):
        calls.append(len(images))
        return images.mean((1, 2, 3))

    return make(4, reward=counted), calls


@pytest.fixture(scope="session")
def noise():
    """`noise(number, seed)`: latents of the tiny model, float32."""
    return lambda number, seed=0: np.random.default_rng(seed).standard_normal((number, 4, 4, 4)).astype(np.float32)


@pytest.fixture(scope="session")
def same():
    """`same(ours, theirs)`: observations are equal, ours a batch, theirs an array of dictionaries."""

    def check(ours, theirs):
        for key in ("prompt", "timestep", "latents"):
            expected = np.stack([row[key] for row in theirs])
            assert ours[key].dtype == expected.dtype
            np.testing.assert_array_equal(ours[key], expected, err_msg=key)

    return check


@pytest.fixture(scope="session")
def trained():
    """`trained(algorithm, collector, episodes, **changes)`: what Tianshou's trainer tells of its training."""
    from tianshou.trainer import OnPolicyTrainerParams

    def train(algorithm, collector, episodes, **changes):
        settings = {
            "training_collector": collector,
            "max_epochs": 1,
            "epoch_num_steps": episodes * T,
            "collection_step_num_env_steps": None,
            "collection_step_num_episodes": episodes,
            "batch_size": None,
            "show_progress": False,
            "verbose": False,
            **changes,
        }
        return algorithm.run_training(OnPolicyTrainerParams(**settings))

    return train
