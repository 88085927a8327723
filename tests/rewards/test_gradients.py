"""Gradients of the rewards with a vision model: same values as without, and finite differences."""

import pytest
import torch

from diffusion_gym.rewards import evaluate, make_reward
from diffusion_gym.rewards.differentiable import differentiable_scores, is_differentiable
from diffusion_gym.rewards.hpsv2 import _squared
from diffusion_gym.rewards.preprocessing import Preprocessing, clip_preprocessing, read_preprocessing
from diffusion_gym.rewards.weighted import WeightedSum
from diffusion_gym.storage import write_json

NAMES = ["Aesthetic", "CLIPScore", "PickScore", "ImageReward", "HPSv2", "Over50"]
PROMPTS = ["a red circle", "two blue stars", "a cat"]


@pytest.fixture
def images(pictures):
    return lambda size, number=3: (pictures(number, *size)[0] * 255).round() / 255


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(32, 32), (50, 50), (24, 40)])
def test_scores_are_the_same_with_gradient_and_without(name, size, checkpoint, images):
    reward = make_reward(name, batch_size=2, **checkpoint(name))
    shown = images(size)
    plain = evaluate(reward, shown, PROMPTS).scores
    scores = differentiable_scores(reward, shown.clone().requires_grad_(), PROMPTS, [{}] * 3)
    torch.testing.assert_close(scores.detach(), plain, atol=1e-5, rtol=1e-5)
    assert is_differentiable(reward)
    assert not reward(shown, PROMPTS, [{}] * 3).scores.requires_grad
    with torch.no_grad():
        assert not reward(shown.clone().requires_grad_(), PROMPTS, [{}] * 3).scores.requires_grad


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(32, 32), (50, 50), (24, 40)])
def test_the_gradient_is_that_of_finite_differences(name, size, checkpoint, images, monkeypatch):
    """Along random directions, of the score of the smooth preprocessing, moved by what 8 bits make of the picture."""
    reward = make_reward(name, **checkpoint(name))
    shown = images(size)
    if name == "CLIPScore":  # is flat where the cosine is below 0
        keep = evaluate(reward, shown, PROMPTS).scores > 0
        shown, prompts = shown[keep], [prompt for prompt, kept in zip(PROMPTS, keep, strict=True) if kept]
    else:
        prompts = PROMPTS
    assert prompts
    moved = shown.clone().requires_grad_()
    scores = differentiable_scores(reward, moved, prompts, [{}] * len(prompts))
    (gradient,) = torch.autograd.grad(scores.sum(), moved)
    exact = Preprocessing.__call__

    def frozen(self, images):
        with torch.no_grad():
            offset = exact(self, base) - self.smooth(base)
        return self.smooth(images) + offset

    base = _squared(shown) if name == "HPSv2" else shown
    monkeypatch.setattr(Preprocessing, "__call__", frozen)
    generator = torch.Generator().manual_seed(0)
    typical = gradient.norm().item() / gradient.numel() ** 0.5  # of the slope along a random direction
    for direction in (gradient, *(torch.randn(shown.shape, generator=generator) for _ in range(4))):
        step, unit = 0.02, direction / direction.norm()
        above, below = (reward(shown + sign * step * unit, prompts, []).scores.double().sum() for sign in (1, -1))
        slope = (gradient * unit).sum().item()
        assert slope == pytest.approx(((above - below) / (2 * step)).item(), rel=0.02, abs=0.05 * typical)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


@pytest.mark.parametrize("size", [(64, 64), (96, 131), (30, 17)])
@pytest.mark.parametrize("kind", ["clip", "vit"])
def test_preprocessing_with_gradient_has_the_processors_values(kind, size, images, tmp_path):
    vit = {"image_processor_type": "ViTImageProcessor", "do_resize": True, "do_rescale": True, "do_normalize": True}
    vit |= {"size": {"height": 32, "width": 32}, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    write_json(tmp_path / "preprocessor_config.json", vit)
    preprocessing = clip_preprocessing(32) if kind == "clip" else read_preprocessing(str(tmp_path))
    shown = images(size)
    made = preprocessing(shown.clone().requires_grad_())
    torch.testing.assert_close(made.detach(), preprocessing(shown), atol=1e-5, rtol=0)
    assert made.requires_grad
    # The smooth values alone are off by the two roundings to 8 bits, and by Pillow's cut at black and white.
    difference = (preprocessing.smooth(shown) - preprocessing(shown)).abs()
    assert difference.mean() < 0.02 and difference.median() < 0.015


def test_a_processor_that_does_more_has_no_gradient(images):
    class Inverted:
        do_resize, do_center_crop = False, False
        image_mean, image_std = [0.0] * 3, [1.0] * 3

        def __call__(self, pictures, **options):
            return {"pixel_values": 1 - torch.stack([torch.from_numpy(one).permute(2, 0, 1) / 255 for one in pictures])}

    with pytest.raises(ValueError, match="does not just resize, crop and normalise"):
        Preprocessing(Inverted())(images((8, 8)).requires_grad_())


def test_a_sum_has_the_gradient_of_its_parts(checkpoint, images):
    parts = {name: make_reward(name, **checkpoint(name)) for name in ("Aesthetic", "PickScore")}
    shown, prompts = images((32, 32)), PROMPTS
    total = WeightedSum(
        {"Aesthetic": (parts["Aesthetic"], 2.0), "PickScore": (parts["PickScore"], -0.5)},
        z_scores={"PickScore": [1, 4]},
    )
    assert is_differentiable(total)

    def gradient(reward):
        moved = shown.clone().requires_grad_()
        return torch.autograd.grad(differentiable_scores(reward, moved, prompts, [{}] * 3).sum(), moved)[0]

    expected = 2.0 * gradient(parts["Aesthetic"]) - 0.5 / 4 * gradient(parts["PickScore"])
    torch.testing.assert_close(gradient(total), expected, atol=1e-6, rtol=1e-4)
    plain = evaluate(total, shown, prompts)
    moved = shown.clone().requires_grad_()
    output = total(moved, prompts, [{}] * 3)
    torch.testing.assert_close(output.scores.detach(), plain.scores)
    assert {"Aesthetic", "PickScore"} <= set(output.info)


@pytest.mark.parametrize(("weight", "differentiable"), [(1.0, False), (0.0, True)])
def test_a_sum_is_differentiable_where_all_that_count_are(weight, differentiable, checkpoint, images):
    made = make_reward({"Aesthetic": 1.0, "Compressibility": weight}, keywords={"Aesthetic": checkpoint("Aesthetic")})
    assert is_differentiable(made) is differentiable
    output = made(images((32, 32)).requires_grad_(), PROMPTS, [{}] * 3)
    assert output.scores.requires_grad is differentiable and not output.info["Compressibility"].requires_grad
