"""Linear layers by oneDNN: the same numbers and gradients as torch's, wherever the switch says so."""

import copy
import shutil

import pytest
import torch
from torch import nn
from torch.nn import functional

from diffusion_gym.models import linear, load_model

needs_onednn = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch has no oneDNN to compare with"
)


@pytest.fixture
def chosen(monkeypatch):
    """`chosen(value)`: the switch of the environment, read anew."""

    def choose(value):
        linear.by_onednn.cache_clear()
        monkeypatch.setenv(linear.SWITCH, value)

    yield choose
    linear.by_onednn.cache_clear()


@pytest.fixture
def calls(monkeypatch):
    """The shapes that oneDNN multiplied."""
    found, product = [], linear.onednn_linear
    monkeypatch.setattr(linear, "onednn_linear", lambda *given: found.append(given[0].shape) or product(*given))
    return found


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2048, 64), (4, 512, 64), (3, 683, 64)], ids=str)
def test_values_and_gradients_are_those_of_torch(chosen, calls, shape, bias):
    """In float32 against float64, also the gradient of a gradient."""
    chosen("onednn")
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*size, generator=generator) for size in (shape, (48, 64)))
    given = [x, weight, *([torch.randn(48, generator=generator)] if bias else [])]
    out = torch.randn(*shape[:-1], 48, generator=generator)

    def all_of(product, dtype):
        inputs = [value.to(dtype).requires_grad_(True) for value in given]
        value = product(*inputs)
        first = torch.autograd.grad(value, inputs, out.to(dtype), create_graph=True)
        second = torch.autograd.grad(sum(each.square().mean() for each in first), inputs[:2])
        return [value, *first, *second]

    ours, exact = all_of(linear.linear, torch.float32), all_of(functional.linear, torch.float64)
    assert len(calls) >= 2
    for one, other in zip(ours, exact, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize(
    ("size", "dtype", "choice"),
    [(2048, torch.float32, "torch"), (2, torch.float32, "onednn"), (2048, torch.bfloat16, "onednn")],
    ids=["switched off", "small", "half precision"],
)
def test_what_is_left_to_torch(chosen, calls, size, dtype, choice):
    if choice == "onednn" and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    chosen(choice)
    layer = nn.Linear(64, 48).to(dtype)
    x = torch.randn(size, 64).to(dtype)
    expected = layer(x)
    layer.__class__ = linear.OneDNNLinear
    assert torch.equal(layer(x), expected) and not calls
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16 and not calls


@needs_onednn
def test_a_model_s_network_has_them_and_saves_the_same(chosen, tiny_pipeline, tmp_path):
    networks = []
    for choice in ("torch", "onednn"):
        chosen(choice)
        folder = shutil.copytree(tiny_pipeline, tmp_path / choice)  # one folder's models share their network
        networks.append(load_model(str(folder), "cpu", "float32", {}).unet)
    plain, fast = networks
    kinds = [{type(layer) for layer in network.modules() if isinstance(layer, nn.Linear)} for network in networks]
    assert kinds == [{nn.Linear}, {linear.OneDNNLinear}]
    assert {type(layer) for layer in copy.deepcopy(fast).modules() if isinstance(layer, nn.Linear)} == kinds[1]
    mine, theirs = fast.state_dict(), plain.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(("speedup", "expected"), [(2.2, True), (1.1, False)])
def test_a_measurement_decides_once(chosen, monkeypatch, speedup, expected):
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    turns = []
    monkeypatch.setattr(linear, "_speedup", lambda: turns.append(1) or speedup)
    chosen("auto")
    assert [linear.by_onednn() for _ in range(3)] == [expected] * 3 and turns == [1]


def test_a_misspelt_switch_is_refused(chosen):
    chosen("mkl")
    with pytest.raises(
        ValueError, match=r"^DIFFUSION_GYM_LINEAR='mkl' in the environment must be auto, onednn or torch$"
    ):
        linear.by_onednn()
