"""What the tests of the benchmark share."""

import pytest

from benchmark_suites import write_suite
from diffusion_gym.agents.benchmark.cells import Cell
from run_folders import timeless


@pytest.fixture(scope="session")
def tiny_suite(tmp_path_factory, tiny_pipeline):
    """A suite file of one task, `size`, on the tiny pipeline: 8 reward queries, measured twice."""
    return write_suite(tmp_path_factory.mktemp("suite"), tiny_pipeline)


@pytest.fixture
def cell(tiny_suite, tmp_path):
    """`cell(agent, seed, **options)`: a cell of that suite, in the test's own folder."""

    def make(agent="ddpo_is", seed=0, **options):
        return Cell(str(tiny_suite), "size", agent, seed, str(tmp_path / "out"), **options)

    return make


@pytest.fixture(scope="session")
def without_clocks():
    """`without_clocks(record)`: what must not depend on how fast the machine was."""
    return timeless
