"""Labels of twelve pictures of two prompts, questions about them, and the page."""

import pytest
import torch
from starlette.testclient import TestClient

from diffusion_gym.agents.label.app import make_app
from diffusion_gym.agents.label.questions import Questions
from diffusion_gym.rewards.preference.labels import Labels, Source


@pytest.fixture
def folder(tmp_path):
    labels = Labels.begin(tmp_path / "labels", Source(model="Shapes"))
    pictures = torch.randint(0, 256, (12, 16, 16, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    labels.add_pictures(pictures, ["a red circle"] * 6 + ["two blue stars"] * 6, "a test")
    return labels.folder


@pytest.fixture
def questions(folder):
    """`questions()`: those of the folder as it is, as after a restart."""
    features = torch.randn(12, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return lambda: Questions(Labels(folder), features)


@pytest.fixture
def client(questions):
    return TestClient(make_app(questions(), goal=20), base_url="http://127.0.0.1:8765")
