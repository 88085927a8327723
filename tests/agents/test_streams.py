"""No two uses of a run's seed share their random numbers."""

import numpy as np
import pytest

from diffusion_gym.agents.streams import stream
from diffusion_gym.agents.training import sampling


def uses(seed, iterations=6, batches=6):
    """Each use of a run with this seed, and its stream."""
    purposes = {
        "train": sampling.TRAINING,
        "grid": sampling.GRIDS,
        "eval": sampling.EVALUATION,
        "bench": sampling.BENCHMARK,
        "development": sampling.DEVELOPMENT,
    }
    assert len(set(purposes.values())) == len(purposes)
    for batch in range(batches):
        for iteration in range(iterations):
            for name in ("train", "development"):
                yield (name, iteration, batch), stream((seed, purposes[name], iteration, batch), "rollout")
        for name in ("grid", "eval", "bench"):
            yield (name, batch), stream((seed, purposes[name], batch), "rollout")
    for iteration in range(iterations):
        yield ("update", iteration), stream((seed, purposes["train"], iteration), "update")


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 7])
def test_no_two_streams_of_a_run_are_equal(seed):
    states = {}
    for use, sequence in uses(seed):
        state = tuple(sequence.generate_state(4, np.uint64).tolist())
        assert states.setdefault(state[:3], use) == use  # the three numbers that a rollout takes


def test_the_padding_that_makes_a_tag_necessary():
    """NumPy's: a shorter entropy is one with zeros after it."""
    first, second = (np.random.SeedSequence(entropy).generate_state(4) for entropy in ([5, 0, 3], [5, 0, 3, 0]))
    assert (first == second).all()
