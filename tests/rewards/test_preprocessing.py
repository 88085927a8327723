"""Pixel values against transformers' own image processors, which resize with Pillow."""

import pytest
import torch
from transformers import AutoImageProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from diffusion_gym.rewards.preprocessing import Preprocessing, clip_preprocessing, read_preprocessing
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


@pytest.mark.parametrize("size", [(8, 8), (64, 64), (224, 224), (256, 256), (512, 512), (96, 131), (417, 300)])
def test_clip_pixels_are_those_of_its_processor(size, saved, pictures):
    _check(saved(CLIP), *pictures(2, *size), most=2, mean=0.02)


@pytest.mark.parametrize("size", [(8, 8), (64, 64), (224, 224), (256, 256), (512, 512)])
def test_vit_pixels_are_those_of_its_processor(size, saved, pictures):
    # A bilinear mean of 8-bit values is often just at a half, which either side rounds as its last bit happens to be.
    _check(saved(VIT), *pictures(2, *size), most=2, mean=0.2)


def _check(folder, images, pil, *, most, mean):
    """At most `most` of 255 levels apart, and `mean` of them on average."""
    preprocessing = read_preprocessing(folder)
    expected = AutoImageProcessor.from_pretrained(folder)(pil, return_tensors="pt").pixel_values
    got = preprocessing(images)
    assert got.shape == expected.shape and got.dtype == torch.float32
    levels = (got - expected).abs() * torch.tensor(preprocessing.std)[:, None, None] * 255
    assert levels.max() <= most + 1e-3 and levels.mean() <= mean


def test_clip_preprocessing_is_what_the_checkpoint_says(saved):
    assert clip_preprocessing(224) == read_preprocessing(saved(CLIP))
    assert read_preprocessing(saved(VIT)) == Preprocessing((224, 224), None, "bilinear", (0.5,) * 3, (0.5,) * 3)


def test_a_picture_scores_as_its_saved_file_does(pictures):
    images, _ = pictures(1, 64, 64)
    saved_and_read = (images * 255).round() / 255
    assert torch.equal(clip_preprocessing(32)(images), clip_preprocessing(32)(saved_and_read))


@pytest.mark.parametrize(
    "change",
    [
        {"do_resize": False},
        {"do_normalize": False},
        {"rescale_factor": 1.0},
        {"resample": 0},
        {"crop_size": 240},
        {"size": {"longest_edge": 224, "shortest_edge": 200}},
    ],
)
def test_other_processors_are_refused(change, saved):
    with pytest.raises(ValueError, match="not a resize, centre crop and normalise"):
        read_preprocessing(saved({**CLIP, **change}))
