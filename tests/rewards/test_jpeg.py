"""The JPEG rewards."""

import io

import pytest
import torch
from PIL import Image

from diffusion_gym.images import to_uint8
from diffusion_gym.rewards import evaluate, make_reward


def pictures() -> torch.Tensor:
    """Four pictures (4, 3, 64, 64), each with more detail than the one before."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(3, 64, 64, generator=generator)
    return torch.stack([0.5 + amount * (noise - 0.5) for amount in (0.0, 0.1, 0.4, 1.0)])


def test_kilobytes_of_a_quality_95_file_on_disk(tmp_path):
    images = pictures()
    output = evaluate(make_reward("Compressibility"), images, ["a cat"] * 4)
    for score, picture in zip(output.scores, to_uint8(images).numpy(), strict=True):
        Image.fromarray(picture).save(tmp_path / "picture.jpg", quality=95)
        assert score.item() == pytest.approx(-(tmp_path / "picture.jpg").stat().st_size / 1000)


def test_size_at_quality_95_is_not_that_of_the_default_quality():
    image = pictures()[3:]
    buffer = io.BytesIO()
    Image.fromarray(to_uint8(image)[0].numpy()).save(buffer, format="JPEG")
    assert evaluate(make_reward("Incompressibility"), image, ["a cat"]).scores.item() > buffer.tell() / 1000 * 1.2


def test_order_follows_detail_and_the_two_rewards_are_opposite():
    images = pictures()
    small = evaluate(make_reward("Compressibility"), images, ["a cat"] * 4)
    large = evaluate(make_reward("Incompressibility"), images, ["a cat"] * 4)
    assert large.scores.tolist() == sorted(set(large.scores.tolist()))
    assert torch.equal(small.scores, -large.scores)
    for output in (small, large):
        assert torch.equal(output.info["jpeg_kb"], large.scores)
        assert output.scores.dtype == torch.float32


def test_a_batch_keeps_its_order_across_threads():
    images = pictures().repeat(8, 1, 1, 1)
    reward = make_reward("Incompressibility")
    together = evaluate(reward, images, ["a cat"] * 32).scores
    alone = torch.cat([evaluate(reward, image[None], ["a cat"]).scores for image in images])
    assert torch.equal(together, alone)


def test_an_unknown_keyword_is_refused():
    with pytest.raises(TypeError, match="quality"):
        make_reward("Compressibility", quality=50)
