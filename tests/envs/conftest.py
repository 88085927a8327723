"""What the environments' tests share."""

import numpy as np
import pytest


@pytest.fixture
def play():
    """`play(env, seed)`: four steps of standard normal actions; all that reset and steps returned."""

    def played(env, seed=0, steps=4):
        rng = np.random.default_rng(seed)
        results = [env.reset(seed=seed)]
        for _ in range(steps):
            results.append(env.step(rng.standard_normal(env.action_space.shape, dtype=np.float32)))
        return results

    return played
