"""Pixel values against transformers' own image processors, which resize with Pillow."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from diffusion_gym.rewards.preprocessing import clip_preprocessing, read_preprocessing
from diffusion_gym.storage import write_json

# As the hub's checkpoints have them: openai/clip-vit-large-patch14, and the ViT age classifier.
CLIP = {
    "feature_extractor_type": "CLIPFeatureExtractor",
    "do_resize": True,
    "do_center_crop": True,
    "do_normalize": True,
    "size": 224,
    "crop_size": 224,
    "resample": 3,
    "image_mean": OPENAI_CLIP_MEAN,
    "image_std": OPENAI_CLIP_STD,
}
VIT = {
    "feature_extractor_type": "ViTFeatureExtractor",
    "do_resize": True,
    "do_normalize": True,
    "size": 224,
    "resample": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


@pytest.fixture
def saved(tmp_path):
    """`saved(config)`: a directory that holds `config` as an image processor."""

    def write(config):
        write_json(tmp_path / "preprocessor_config.json", config)
        return str(tmp_path)

    return write


@pytest.mark.parametrize("config", [CLIP, VIT], ids=["clip", "vit"])
@pytest.mark.parametrize("size", [(1, 7), (64, 64), (96, 131), (417, 3)])
def test_pixels_are_those_of_the_processor(config, size, saved, pictures):
    images, pil = pictures(2, *size)
    folder = saved(config)
    expected = AutoImageProcessor.from_pretrained(folder, backend="pil")(pil, return_tensors="pt").pixel_values
    got = read_preprocessing(folder)(images)
    assert got.dtype == torch.float32 and torch.equal(got, expected)
    if config is CLIP:
        assert torch.equal(clip_preprocessing(224)(images), expected)


def test_pixels_are_those_of_clips_own_transforms(pictures):
    """By hand with Pillow, as openai/CLIP and ImageReward do: resize, crop, normalise."""
    images, (picture,) = pictures(1, 96, 131)
    resized = picture.resize((round(131 * 32 / 96 - 0.5), 32), Image.BICUBIC)
    left = (resized.width - 32) // 2
    cropped = np.asarray(resized.crop((left, 0, left + 32, 32)), dtype=np.float32) / 255
    expected = (cropped - np.array(OPENAI_CLIP_MEAN)) / np.array(OPENAI_CLIP_STD)
    got = clip_preprocessing(32)(images)[0].permute(1, 2, 0)
    torch.testing.assert_close(got, torch.from_numpy(expected).float(), atol=1e-5, rtol=0)


def test_a_picture_scores_as_its_saved_file_does(pictures):
    images, _ = pictures(1, 64, 64)
    saved_and_read = (images * 255).round() / 255
    assert torch.equal(clip_preprocessing(32)(images), clip_preprocessing(32)(saved_and_read))


@pytest.mark.parametrize(
    "change",
    [{"resample": 99}, {"image_mean": [0.5]}],
)
def test_processors_that_cannot_work_are_refused(change, saved):
    folder = saved({**CLIP, **change})
    with pytest.raises(ValueError, match="the image processor of .* cannot be used .*use a checkpoint with") as caught:
        read_preprocessing(folder)
    assert "\n" not in str(caught.value)
