"""The layers that adapters make of linear ones, beside peft's own."""

import pytest
import torch
from peft.tuners.lora.layer import Linear
from torch import nn

from diffusion_gym.models.lora import AdaptedLinear, adapters_merged, with_lora

ROUNDED = {"rtol": 0.02, "atol": 0.02}  # bfloat16, of sums in which terms of about 1 cancel


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_out = nn.Linear(6, 5, bias=False), nn.ModuleList([nn.Linear(6, 5)])


@pytest.fixture(params=["float32", "bfloat16"])
def layers(request):
    torch.manual_seed(0)
    tuned = with_lora(Attention().to(getattr(torch, request.param)), 3)
    found = [tuned.to_q, tuned.to_out[0]]
    for layer in found:
        layer.lora_B["default"].weight.data.normal_()
    return found


def states(layer, shape=(2, 4, 6)):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return x.to(layer.get_base_layer().weight.dtype).requires_grad_(True)


def results(forward, layer):
    """The output and all gradients."""
    x, weights = states(layer), [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    output = forward(x)
    return [output, *torch.autograd.grad(output.float().square().sum(), [x, *weights])]


def test_output_and_gradients_are_those_of_peft(layers):
    for layer in layers:
        assert isinstance(layer, AdaptedLinear)
        ours, theirs = results(layer, layer), results(lambda x, layer=layer: Linear.forward(layer, x), layer)
        assert [value.dtype for value in ours] == [value.dtype for value in theirs]
        torch.testing.assert_close(ours, theirs)
        assert not torch.allclose(ours[0], layer.get_base_layer()(states(layer)))


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 4, 6)])
def test_any_number_of_dimensions(layers, shape):
    for layer in layers:
        x = states(layer, shape)
        torch.testing.assert_close(layer(x), Linear.forward(layer, x))


def test_under_autocast(layers):
    for layer in layers:
        x = states(layer).float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours, theirs = layer(x), Linear.forward(layer, x)
        assert ours.dtype == theirs.dtype == torch.bfloat16
        torch.testing.assert_close(ours, theirs, **ROUNDED)


def test_switched_off_or_merged_it_is_the_base_layer(layers):
    for layer in layers:
        x = states(layer)
        before = layer(x)
        with adapters_merged(layer):
            merged = layer(x)
            assert torch.equal(merged, layer.get_base_layer()(x))
        torch.testing.assert_close(merged, before, **(ROUNDED if x.dtype == torch.bfloat16 else {}))
        assert torch.equal(layer(x), before)
        layer.merge()
        assert torch.equal(layer(x), layer.get_base_layer()(x))
