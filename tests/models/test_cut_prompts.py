"""Prompts that a model sees in part only."""

import warnings

import gymnasium as gym
import pytest
import torch

from diffusion_gym.models import load_model
from diffusion_gym.prompts.base import PromptSet
from diffusion_gym.testing.random_pipeline import write_pipeline

RED = "a red circle"
LONG = f"{RED} and " + "a blue star and " * 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {size: write_pipeline(root / size, size, 0, torch.float32) for size in ("tiny", "tiny-sdxl", "tiny-ddpm")}


def make(folders, prompts, size="tiny", **keywords):
    return gym.make_vec("DiffusionDenoise-v0", num_envs=1, model=str(folders[size]), prompts=prompts, **keywords)


@pytest.mark.parametrize("size", ["tiny", "tiny-sdxl"])
def test_prompts_that_are_cut_are_told_once_a_set_with_what_is_cut(size, folders):
    pair = (f"{LONG}a green square", f"{LONG}a white star")
    model = load_model(folders[size], "cpu", "float32")
    assert torch.equal(*model.tokenize(pair))  # to the model they are one
    with pytest.warns(UserWarning, match="2 of 3") as told:
        env = make(folders, PromptSet("mine", (RED, *pair)), size)
        for seed in range(5):
            env.reset(seed=seed)
    found = [str(each.message) for each in told if issubclass(each.category, UserWarning)]
    assert len(found) == len(model.tokenizers)
    assert found[0].startswith("prompts='mine': 2 of 3 are longer than the 16 tokens that CLIPTokenizer")
    cut = " ".join(pair[0].split()[14:])  # with the marks of beginning and end 14 words are 16 tokens
    assert len(cut) < 80 and found[0].endswith(f" it does not see {cut!r}")


def test_a_prompt_that_is_given_and_cut_is_told_too(folders):
    env = make(folders, [RED])
    with pytest.warns(UserWarning, match=r"options\['prompt'\]: 1 of 1 are longer .* does not see '.*star and'"):
        env.reset(options={"prompt": LONG})


def test_prompts_that_fit_exactly_are_not_cut(folders):
    """14 words and the marks of beginning and end are 16 tokens."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = make(folders, [RED, " ".join(["star"] * 14)])
        env.reset(seed=0)
        env.reset(options={"prompt": "   ".join(["star"] * 14)})
        make(folders, None, "tiny-ddpm").reset(seed=0)
    with pytest.warns(UserWarning, match="1 of 1 are longer .* does not see 'star'"):
        make(folders, [" ".join(["star"] * 15)])
