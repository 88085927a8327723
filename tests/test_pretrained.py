"""Every network that a reward loads has all of its weights from its files, or is refused by name."""

import re
from pathlib import Path

import pytest
import torch

from diffusion_gym.rewards import make_reward
from diffusion_gym.rewards.bertscore import BERTScore
from diffusion_gym.rewards.vlm.llava import LocalVLM
from diffusion_gym.storage import load_tensors, save_tensors
from diffusion_gym.testing.random_checkpoints import CHECKPOINTS
from diffusion_gym.testing.random_vlm import write_random_bert, write_random_llava


def of_transformers(name, keyword):
    def make(folder):
        kwargs = CHECKPOINTS[name](folder)
        return kwargs[keyword], lambda: make_reward(name, **kwargs)

    return make


def bert(folder):
    place = write_random_bert(folder)
    return place, lambda: BERTScore(str(place), layers=2)(["a cat"], ["a cat"])


def llava(folder):
    place = write_random_llava(folder)
    return place, lambda: LocalVLM(str(place)).describe(torch.zeros(1, 28, 28, 3, dtype=torch.uint8), ["what is it"])


NETWORKS = {
    "clip": of_transformers("CLIPScore", "clip"),
    "vit": of_transformers("Over50", "classifier"),
    "bert": bert,
    "llava": llava,
}


@pytest.mark.parametrize("network", list(NETWORKS))
def test_weights_that_are_missing_misshapen_or_unknown_are_named(network, tmp_path):
    folder, use = NETWORKS[network](tmp_path)
    (path,) = Path(folder).glob("*.safetensors")
    tensors = load_tensors(path)
    name = min(name for name in tensors if re.search(r"layer_?norm1.weight|norm_before|query.weight", name))
    changed = {
        "it lacks '": {key: value for key, value in tensors.items() if key != name},
        "it holds in another shape '": {**tensors, name: torch.cat([tensors[name]] * 2)},
        "holds whole numbers at '": {**tensors, name: tensors[name].to(torch.int8)},
        "it holds for nothing 'zz.w'": {**tensors, "zz.w": torch.ones(1)},
    }
    use()  # what was loaded before the files changed is not taken
    for message, weights in changed.items():
        save_tensors(path, weights, {"format": "pt"})
        if (
            network == "bert" and "nothing" in message
        ):  # of a published encoder the deeper layers and heads are not used
            use()
            continue
        with pytest.raises(ValueError, match=message) as caught:
            use()
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize("network", list(NETWORKS))
def test_a_truncated_file_is_named_with_what_to_do(network, tmp_path):
    folder, use = NETWORKS[network](tmp_path)
    (path,) = Path(folder).glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated .*\); copy or download it again$"):
        use()
