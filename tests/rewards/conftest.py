"""What the tests of rewards share: tiny random checkpoints, pictures, and a server to ask."""

import functools

import pytest
import torch
from PIL import Image

from chat_server import ChatServer
from diffusion_gym.images import to_uint8
from diffusion_gym.testing.random_checkpoints import CHECKPOINTS


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """`checkpoint(name)`: the `reward_kwargs` of reward `name` on its tiny random checkpoint."""

    @functools.cache
    def written(name):
        return CHECKPOINTS[name](tmp_path_factory.mktemp("rewards") / name)

    return lambda name: dict(written(name))


@pytest.fixture(scope="session")
def pictures():
    """`pictures(n, height, width)`: float `(n, 3, height, width)` in [0, 1], smooth with noise, and as PIL images."""

    def drawn(number, height, width, seed=0):
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.rand(number, 3, 4, 4, generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
        images = (smooth + 0.1 * torch.randn(number, 3, height, width, generator=generator)).clamp(0, 1)
        return images, [Image.fromarray(picture) for picture in to_uint8(images).numpy()]

    return drawn


@pytest.fixture
def start_server():
    """`start_server(port)` starts a server; all are closed at the end."""
    running = []

    def start(port=0):
        running.append(ChatServer(port))
        return running[-1]

    yield start
    for server in running:
        server.close()


@pytest.fixture
def server(start_server):
    return start_server()


@pytest.fixture
def dead_url(start_server):
    """A URL at which nothing listens."""
    closed = start_server()
    closed.close()
    return closed.url
