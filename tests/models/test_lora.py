"""The layers that adapters make of linear ones, beside peft's own."""

import pytest
import torch
from peft.tuners.lora.layer import Linear
from torch import nn

from diffusion_gym.models.lora import AdaptedLinear, _WholeProduct, with_lora

ROUNDED = {"rtol": 0.02, "atol": 0.02}  # bfloat16, of sums in which terms of about 1 cancel


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_out = nn.Linear(6, 5, bias=False), nn.ModuleList([nn.Linear(6, 5)])


@pytest.fixture(params=["float32", "bfloat16"])
def layers(request):
    torch.manual_seed(0)
    tuned = with_lora(Attention().to(getattr(torch, request.param)), 3, alpha=4.5)
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
        exact = ours[0].dtype == torch.float32  # they sum in another order
        torch.testing.assert_close(ours, theirs, **({"rtol": 1e-4, "atol": 1e-4} if exact else ROUNDED))
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


def test_it_is_the_product_with_the_whole_weight_with_and_without_gradients(layers):
    for layer in layers:
        x = states(layer)
        with torch.no_grad():
            without = layer(x)
        torch.testing.assert_close(layer(x), without)
        layer.merge()
        whole = layer.get_base_layer()(x)
        if x.dtype == torch.float32:
            torch.testing.assert_close(without, whole)
        else:  # bfloat16 keeps what a merged weight rounds
            torch.testing.assert_close(without, whole, **ROUNDED)
            assert not torch.equal(without, whole)
        assert torch.equal(layer(x), whole)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6)])
def test_gradients_of_the_whole_product_are_those_of_finite_differences(bias, shape):
    make = torch.Generator().manual_seed(0)
    x, weight, down, up = (
        torch.randn(size, generator=make, dtype=torch.float64) for size in (shape, (5, 6), (2, 6), (5, 2))
    )
    trained = [part.requires_grad_(True) for part in (x, down, up)]
    offset = torch.randn(5, generator=make, dtype=torch.float64) if bias else None
    assert torch.autograd.gradcheck(lambda x, down, up: _WholeProduct.apply(x, weight, offset, down, up, 1.5), trained)


def test_prompts_get_no_gradient(layers):
    for layer in layers:
        x = states(layer).detach()
        layer(x).float().sum().backward()
        assert x.grad is None and layer.get_base_layer().weight.grad is None
        assert all(adapter["default"].weight.grad.any() for adapter in (layer.lora_A, layer.lora_B))


def test_switched_off_it_is_the_base_layer(layers):
    for layer in layers:
        x = states(layer)
        before = layer(x)
        layer.enable_adapters(False)
        assert torch.equal(layer(x), layer.get_base_layer()(x))
        layer.enable_adapters(True)
        assert torch.equal(layer(x), before)
