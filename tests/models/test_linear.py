"""Linear layers by oneDNN: the same numbers and gradients as torch's, wherever the switch says so."""

import copy
import shutil
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from torch import nn
from torch.nn import functional

from agent_updates import transitions
from diffusion_gym import models
from diffusion_gym.agents import DenoisingPolicy
from diffusion_gym.agents.rollout import collect
from diffusion_gym.models import linear, load_model

SHAPES = Path(models.__file__).parent / "shapes" / "weights"

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
@pytest.mark.parametrize("size", [(96, 64), (64, 96)], ids=["widens", "narrows"])
@pytest.mark.parametrize("batch", [(2048,), (4, 512), (3, 683)], ids=str)
def test_values_and_gradients_are_those_of_torch(chosen, calls, batch, size, bias):
    """In float32 against float64, also the gradient of a gradient."""
    chosen("onednn")
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator) for shape in ((*batch, size[1]), size))
    given = [x, weight, *([torch.randn(2 * size[0], generator=generator)[::2]] if bias else [])]  # not contiguous
    out = torch.randn(*batch, size[0], generator=generator)

    def all_of(product, dtype):
        inputs = [value.to(dtype).detach().requires_grad_(True) for value in given]
        value = product(*inputs)
        first = torch.autograd.grad(value, inputs, out.to(dtype), create_graph=True)
        second = torch.autograd.grad(sum(each.square().mean() for each in first), inputs[:2])
        return [value, *first, *second]

    ours, exact = all_of(linear.linear, torch.float32), all_of(functional.linear, torch.float64)
    assert len(calls) > 3  # forward and both gradients, and theirs
    for one, other in zip(ours, exact, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize(
    ("width", "dtype", "choice"),
    [(96, torch.float32, "torch"), (8, torch.float32, "onednn"), (96, torch.bfloat16, "onednn")],
    ids=["switched off", "small", "half precision"],
)
def test_what_is_left_to_torch(chosen, calls, width, dtype, choice):
    if choice == "onednn" and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    chosen(choice)
    layer = nn.Linear(64, width).to(dtype)
    x = torch.randn(2048, 64).to(dtype)
    expected = layer(x)
    calls.clear()  # those of the switch
    layer.__class__ = linear.OneDNNLinear
    assert torch.equal(layer(x), expected) and not calls
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16 and not calls
    assert layer(x[:0]).shape == (0, width) and not calls


@needs_onednn
def test_products_of_an_adapter_s_gradients(chosen, calls):
    """Narrow ones of many rows go through oneDNN, few numbers do not; either way they are torch's."""
    chosen("onednn")
    assert linear.by_onednn() is True
    calls.clear()  # those of the switch
    generator = torch.Generator().manual_seed(0)
    for rows, by_onednn in ((2048, True), (64, False)):
        x, narrow = torch.randn(rows, 64, generator=generator), torch.randn(64, 4, generator=generator)
        for one, other in ((x, narrow.T), (narrow.T, x), (x.T, torch.randn(4, rows, generator=generator))):
            exact = one.double() @ other.T.double()
            assert (linear.product(one, other) - exact).abs().max() <= 1e-5 * exact.abs().max()
        assert len(calls) == (3 if by_onednn else 0)
        calls.clear()


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


@needs_onednn
@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_the_ratio_of_a_fresh_rollout_is_1_in_a_batch_of_any_size(chosen, calls, tmp_path, trainable):
    """On the embedded model's own widths, which are those of layers on either side of the bound."""
    chosen("onednn")
    folder = shutil.copytree(SHAPES, tmp_path / "shapes")
    names = {"model": str(folder), "reward": "Color", "prompts": ["a red circle"], "guidance_scale": 5.0}
    env = gym.make_vec("DiffusionDenoise-v0", 16, num_inference_steps=4, autoreset_mode="Disabled", **names)
    policy = DenoisingPolicy.from_env(env, trainable=trainable)
    rolled = collect(env, policy, torch.Generator().manual_seed(0), seed=0)
    assert calls
    pairs = [(sample, step) for sample in range(16) for step in range(4)]
    with torch.no_grad():
        for part in (pairs[:3], pairs[:40]):
            samples, steps = zip(*part, strict=True)
            ratios = (policy(*transitions(rolled, part)) - rolled.log_probs[steps, samples]).exp()
            assert (ratios - 1).abs().max() <= 1e-6


@needs_onednn
@pytest.mark.parametrize("trains", ["x", "weight", "bias"])
def test_only_what_a_gradient_needs_is_kept(chosen, trains):
    """As torch does: a frozen layer keeps no input, so that adapters elsewhere cost no more memory."""
    chosen("onednn")
    inputs = {"x": torch.randn(64, 64), "weight": torch.randn(96, 64), "bias": torch.randn(96)}
    inputs[trains].requires_grad_(True)

    def kept(product):
        found = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: found.append(tensor.shape) or tensor, lambda t: t):
            product(*inputs.values())
        return sum(shape.numel() for shape in found)

    assert kept(linear.linear) <= kept(functional.linear)


def test_the_measurement_does_not_follow_the_program_s_defaults(monkeypatch):
    """Neither its type nor its device nor its threads, which it leaves as they were."""
    threads = torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert linear._speedup() > 0 or not hasattr(torch.ops.mkldnn, "_linear_pointwise")
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.get_num_threads() == threads

    def missing(*given):
        raise RuntimeError("this torch has no oneDNN")

    monkeypatch.setattr(linear, "onednn_linear", missing)
    assert linear._speedup() == 0


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
