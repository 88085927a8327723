"""`CLIPScore` and `PickScore` against transformers' CLIP on PIL images, one picture and prompt at a time."""

import math
import shutil

import pytest
import torch
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from diffusion_gym.rewards import RewardError, evaluate, make_reward
from diffusion_gym.testing.random_checkpoints import clip_config

PROMPTS = ["a red circle", "two blue stars and a green square", ""]


def logits(folder, pil, prompts):
    """CLIP's own picture-to-text logits, exp(logit_scale) cos, of each pair alone: `(N,)`."""
    model = CLIPModel.from_pretrained(folder).eval()
    tokenizer, processor = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    found = []
    for picture, prompt in zip(pil, prompts, strict=True):
        pixels = processor(picture, return_tensors="pt").pixel_values
        with torch.no_grad():
            found.append(model(pixel_values=pixels, **tokenizer(prompt, return_tensors="pt")).logits_per_image[0, 0])
    return torch.stack(found), model.logit_scale.exp().item()


@pytest.mark.parametrize(("size", "tolerance"), [(32, 1e-5), (48, 0.02), (8, 0.02)])
def test_clip_score(size, tolerance, checkpoint, pictures):
    kwargs = checkpoint("CLIPScore")
    images, pil = pictures(3, size, size)
    scaled, temperature = logits(kwargs["clip"], pil, PROMPTS)
    output = evaluate(make_reward("CLIPScore", **kwargs), images, PROMPTS)
    cosine = scaled / temperature
    torch.testing.assert_close(output.info["cosine"], cosine, atol=tolerance, rtol=0)
    torch.testing.assert_close(output.scores, 2.5 * cosine.clamp(min=0), atol=2.5 * tolerance, rtol=0)
    assert (cosine < 0).any() or (output.scores > 0).all()


def test_clip_score_is_never_negative_and_its_cosine_is(checkpoint, pictures):
    images, _ = pictures(12, 32, 32)
    output = evaluate(make_reward("CLIPScore", **checkpoint("CLIPScore")), images, ["a star", "two squares"] * 6)
    below = output.info["cosine"] < 0
    assert below.any() and not below.all()
    assert (output.scores[below] == 0).all() and (output.scores[~below] > 0).all()


def test_clip_score_prefix_goes_before_each_prompt(checkpoint, pictures):
    images, _ = pictures(2, 32, 32)
    kwargs = checkpoint("CLIPScore")
    prefixed = evaluate(make_reward("CLIPScore", prefix="a red ", **kwargs), images, ["star", "circle"])
    written = evaluate(make_reward("CLIPScore", **kwargs), images, ["a red star", "a red circle"])
    other = evaluate(make_reward("CLIPScore", **kwargs), images, ["star", "circle"])
    torch.testing.assert_close(prefixed.info["cosine"], written.info["cosine"])
    assert not torch.allclose(prefixed.info["cosine"], other.info["cosine"])


def test_pick_score_is_clips_own_logit(checkpoint, pictures):
    kwargs = checkpoint("PickScore")
    images, pil = pictures(3, 32, 32)
    expected, temperature = logits(kwargs["clip"], pil, PROMPTS)
    output = evaluate(make_reward("PickScore", **kwargs), images, PROMPTS)
    assert not math.isclose(temperature, 1)
    torch.testing.assert_close(output.scores, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(output.info["cosine"], expected / temperature, atol=1e-5, rtol=0)


def test_temperature_keeps_its_digits_in_bfloat16(checkpoint, pictures):
    kwargs = checkpoint("PickScore")
    images, pil = pictures(3, 32, 32)
    _, temperature = logits(kwargs["clip"], pil, PROMPTS)
    output = evaluate(make_reward("PickScore", dtype="bfloat16", **kwargs), images, PROMPTS)
    torch.testing.assert_close(output.scores / output.info["cosine"], torch.full((3,), temperature))


def test_published_shape_is_vit_large(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("CLIPScore")["clip"])
    with torch.device("meta"):
        network = CLIPModel(clip_config(tokenizer, published=True))
    assert sum(parameter.numel() for parameter in network.parameters()) == 427_616_513  # as published


@pytest.mark.parametrize(
    ("lost", "message"), [("preprocessor_config.json", "no image processor"), ("tokenizer.json", "no tokenizer")]
)
def test_pick_score_takes_the_processor_from_its_own_place(lost, message, checkpoint, pictures, tmp_path):
    kwargs = checkpoint("PickScore")
    images, _ = pictures(1, 32, 32)
    for name in {"preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"} - {lost}:
        shutil.copy(f"{kwargs['clip']}/{name}", tmp_path)
    with pytest.raises((FileNotFoundError, RewardError), match=f"{tmp_path}' holds {message}"):
        evaluate(make_reward("PickScore", clip=kwargs["clip"], processor=str(tmp_path)), images, ["a star"])


def test_prompts_longer_than_the_context_are_cut(checkpoint, pictures):
    images, _ = pictures(2, 32, 32)
    reward = make_reward("CLIPScore", **checkpoint("CLIPScore"))
    longest = CLIPModel.from_pretrained(checkpoint("CLIPScore")["clip"]).config.text_config.max_position_embeddings
    many = ["star " * 500, "star " * longest]
    output = evaluate(reward, images[:1].repeat(2, 1, 1, 1), many)
    torch.testing.assert_close(output.scores[0], output.scores[1])
