"""Conversion between float NCHW and uint8 NHWC."""

import torch

from diffusion_gym.images import to_float, to_uint8, to_unit


def test_every_level_survives_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(2, 1, 1, 3)
    assert torch.equal(to_uint8(to_float(levels)), levels)


def test_axes_and_layout():
    images = torch.zeros(2, 3, 4, 5)
    images[1, 2, 3, 4] = 1.0
    pictures = to_uint8(images)
    assert pictures.shape == (2, 4, 5, 3)
    assert pictures.dtype == torch.uint8
    assert pictures.is_contiguous()
    assert pictures.nonzero().tolist() == [[1, 3, 4, 2]]
    assert torch.equal(to_float(pictures), images)


def test_rounds_to_the_nearest_level():
    images = torch.tensor([10.49, 10.51]).div(255).reshape(2, 1, 1, 1).expand(2, 3, 1, 1)
    assert to_uint8(images)[:, 0, 0, 0].tolist() == [10, 11]


def test_values_outside_the_range_are_clamped_not_wrapped():
    images = torch.tensor([-0.5, 1.5]).reshape(2, 1, 1, 1).expand(2, 3, 1, 1)
    assert to_uint8(images)[:, 0, 0].tolist() == [[0, 0, 0], [255, 255, 255]]


def test_half_precision_and_gradients_are_accepted():
    images = torch.full((1, 3, 2, 2), 0.5, dtype=torch.bfloat16, requires_grad=True)
    assert to_uint8(images).unique().tolist() == [128]  # 127.5 goes to the even neighbour
    assert to_float(to_uint8(images)).dtype == torch.float32


def test_a_networks_range_becomes_the_unit_and_an_overflow_stays_visible():
    nan, inf = torch.nan, torch.inf
    values = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0, nan, inf, -inf], dtype=torch.float16)
    expected = torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0, nan, nan, nan])
    torch.testing.assert_close(to_unit(values), expected, rtol=0, atol=0, equal_nan=True)


def test_what_is_not_finite_is_black():
    images = torch.tensor([torch.nan, 0.5]).reshape(2, 1, 1, 1).expand(2, 3, 1, 1)
    assert to_uint8(images)[:, 0, 0, 0].tolist() == [0, 128]
