"""Linear layers by oneDNN, on a CPU where that is faster than torch's own way.

On a CPU torch multiplies float32 matrices by MKL, which uses half the width of AMD's AVX-512 processors; oneDNN, which
is in the same wheel and does torch's convolutions, uses all of it. Elsewhere MKL is as fast or faster. A measurement of
some milliseconds decides, once a process. It is not close where it matters (a factor of 2.2 on Zen 5), so that a run
which is resumed on the same machine decides the same.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import cache
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional

SWITCH: Final = "DIFFUSION_GYM_LINEAR"  # of the environment: auto, onednn or torch
_PAYS: Final = 1.3  # how much faster oneDNN has to be
_LEAST: Final = 2**12  # weights of a layer; of smaller ones the call itself is most of the time
_MANY: Final = 2**15  # the same of activations, of which a gradient has several narrow products
_SIDE: Final = 256  # of the matrices that are measured


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The product x W^T + b as `torch.nn.functional.linear`, from `(..., D)` to `(..., D')`, by whichever is faster.

    Which one that is depends on the weight alone: a state has the same prediction in a batch of any size.

    Raises:
        ValueError: the environment's `DIFFUSION_GYM_LINEAR` is none of auto, onednn and torch.
    """
    if weight.numel() < _LEAST or not _fits(x, weight):
        return functional.linear(x, weight, bias)
    found: torch.Tensor = _Product.apply(x, weight, bias)
    return found


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The product x W^T of a backward pass, which is not differentiated, by whichever is faster; one may be narrow."""
    large = max(x.numel(), weight.numel()) >= _MANY
    return onednn_linear(x, weight) if large and _fits(x, weight) else functional.linear(x, weight)


class OneDNNLinear(nn.Linear):
    """`torch.nn.Linear`, computed by `linear`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's name
        """From `(..., D)` to `(..., D')`."""
        return linear(input, self.weight, self.bias)


def with_fast_linear(network: nn.Module) -> nn.Module:
    """`network`, whose linear layers have become `OneDNNLinear` where it is on a CPU and oneDNN is faster there.

    Weights, their names and what is saved stay as they are.
    """
    for layer in network.modules():
        if type(layer) is nn.Linear and layer.weight.device.type == "cpu" and by_onednn():
            layer.__class__ = OneDNNLinear
    return network


def _fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether oneDNN does a product: in float32 on a CPU, neither compiled nor in autocast, where it is faster."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.numel() == 0:
        return False
    plain = x.dtype == weight.dtype == torch.float32 and x.shape[-1:] == weight.shape[1:]
    return plain and not torch.is_autocast_enabled("cpu") and by_onednn()


class _Product(torch.autograd.Function):
    """x W^T + b with its gradients, which are such products themselves."""

    @staticmethod
    def forward(  # type: ignore[override]  # torch types it as variadic
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        for_x, for_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if for_weight else None, weight if for_x else None)
        return onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        out = gradient.reshape(-1, gradient.shape[-1])
        return (
            None if weight is None else _Product.apply(gradient, weight.T, None),
            None if x is None else _weight_gradient(out, x.reshape(-1, x.shape[-1])),
            out.sum(0) if ctx.needs_input_grad[2] else None,
        )


def _weight_gradient(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """out^T x, `(D', D)`. oneDNN copies its first factor where that is a transpose, so that is the smaller one."""
    if x.shape[1] < out.shape[1]:
        transposed: torch.Tensor = _Product.apply(x.T, out.T, None)
        return transposed.T
    found: torch.Tensor = _Product.apply(out.T, x.T, None)
    return found


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The product x W^T + b by oneDNN, whatever its size; it has no gradient."""
    whole = None if bias is None else bias.contiguous()  # of a bias oneDNN reads no strides
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, whole, "none", [], "")
    return found


@cache
def by_onednn() -> bool:
    """Whether oneDNN does the linear layers of this process.

    Raises:
        ValueError: the environment's `DIFFUSION_GYM_LINEAR` is none of auto, onednn and torch, or asks for what this
            torch has not.
    """
    chosen = os.environ.get(SWITCH, "auto")
    if chosen not in ("auto", "onednn", "torch"):
        raise ValueError(f"{SWITCH}={chosen!r} in the environment must be auto, onednn or torch")
    if chosen == "torch":
        return False
    faster = _speedup()
    if chosen == "onednn" and not faster:
        raise ValueError(f"{SWITCH}='onednn' in the environment: this torch has no oneDNN for it; leave it out")
    return faster >= _PAYS or chosen == "onednn"


@torch.no_grad()
def _speedup() -> float:
    """How many times faster oneDNN is, the best of some turns of each; 0 where this torch has none.

    On one thread: with more, other programs of the machine decide.
    """
    x = torch.ones(4 * _SIDE, _SIDE, dtype=torch.float32, device="cpu")

    def seconds(product: Callable[..., torch.Tensor]) -> float:
        found = []
        for _ in range(12):
            started = time.perf_counter()
            product(x, x[:_SIDE])
            found.append(time.perf_counter() - started)
        return min(found)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return seconds(functional.linear) / seconds(onednn_linear)
    except (AttributeError, RuntimeError, TypeError):  # NotImplementedError is a RuntimeError
        return 0.0
    finally:
        torch.set_num_threads(threads)
