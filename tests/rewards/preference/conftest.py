"""A folder of labels with eight pictures of two prompts."""

import pytest
import torch

from diffusion_gym.rewards.preference.labels import Answer, Labels, Source

PROMPTS = ["a red circle"] * 4 + ["two blue stars"] * 4


@pytest.fixture
def labels(tmp_path):
    made = Labels.begin(tmp_path / "labels", Source(model="Shapes"))
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (8, 32, 32, 3), generator=generator).to(torch.uint8)
    made.add_pictures(pictures, PROMPTS, "a test")
    made.given = pictures
    return made


@pytest.fixture
def say():
    """`say(number, answer, first, second, person)`: an answer about pictures by their numbers."""

    def said(number, answer="first", first=1, second=2, person="anna", **more):
        pair = {"first": f"{first:06}.png", "second": f"{second:06}.png"}
        return Answer(person=person, number=number, answer=answer, **pair, **more)

    return said
