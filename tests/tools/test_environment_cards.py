"""docs/environments.md has a card of every id, made of the registries."""

import pytest

from diffusion_gym.envs.registration import environment_ids
from diffusion_gym.prompts import make_prompts
from tools.pages import environments as script


@pytest.fixture(scope="module")
def page():
    return script.parts()["environments"]


def card(page, id_):
    return page.split(f"#### {id_}\n")[1].split("\n###")[0]


def test_every_id_has_one_card(page):
    titles = [line.removeprefix("#### ") for line in page.splitlines() if line.startswith("#### ")]
    assert sorted(titles) == sorted(environment_ids())


def test_a_card_says_the_reward_the_prompts_and_the_spaces(page):
    color = card(page, "DiffusionDenoise-Shapes-Color-v0")
    number = len(make_prompts("shapes-color").prompts)
    assert f"[`shapes-color`](prompts.md), {number} prompts" in color and "share of the caption's facts" in color
    shapes = page.split("### Shapes\n")[1].split("\n#### ")[0]
    assert "| `prompt` (16,), `timestep` (1,), `latents` (4, 8, 8) | (4, 8, 8) | 32 x 32 | 20 | 3 |" in shapes
    assert "none, the model is unconditional" in card(page, "DiffusionDenoise-Church-Aesthetic-v0")


@pytest.mark.parametrize(
    "id_", [id_ for id_, kwargs in environment_ids().items() if script.is_embedded(kwargs["model"])]
)
def test_an_embedded_models_card_has_its_picture_and_the_prompts_of_it(page, id_):
    found = card(page, id_)
    assert "![Four pictures of the pretrained model](images/environments/" in found
    assert found.strip().splitlines()[-1].count('"') == 8


def test_published_facts_are_of_registered_models():
    assert all(model in script.MODELS for model in script.PUBLISHED)
