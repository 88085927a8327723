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
_LEAST: Final = 2**20  # multiplications; of fewer the calls themselves are most of the time
_SIDE: Final = 256  # of the matrices that are measured


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The product x W^T + b as `torch.nn.functional.linear`, from `(..., D)` to `(..., D')`, by whichever is faster.

    Raises:
        ValueError: the environment's `DIFFUSION_GYM_LINEAR` is none of auto, onednn and torch.
    """
    return (
        _Product.apply(x, weight, bias)
        if _fits(x, weight) and by_onednn()
        else functional.linear(x, weight, bias)
    )


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
    """Whether a product is one that oneDNN may do: float32 on a CPU, of some size, outside autocast."""
    plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    return plain and x.numel() * len(weight) >= _LEAST and not torch.is_autocast_enabled("cpu")


class _Product(torch.autograd.Function):
    """x W^T + b with its gradients, which are such products themselves."""

    @staticmethod
    def forward(  # type: ignore[override]  # torch types it as variadic
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        rows, out = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            linear(out, weight.T).view(x.shape) if for_x else None,
            linear(out.T, rows.T) if for_weight else None,
            out.sum(0) if for_bias else None,
        )


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The product x W^T + b by oneDNN, whatever its size; it has no gradient."""
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


@cache
def by_onednn() -> bool:
    """Whether oneDNN does the linear layers of this process.

    Raises:
        ValueError: the environment's `DIFFUSION_GYM_LINEAR` is none of auto, onednn and torch.
    """
    chosen = os.environ.get(SWITCH, "auto")
    if chosen not in ("auto", "onednn", "torch"):
        raise ValueError(f"{SWITCH}={chosen!r} in the environment must be auto, onednn or torch")
    has = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if chosen == "onednn" and not has:
        raise ValueError(f"{SWITCH}='onednn' in the environment: this torch has no oneDNN; leave it out")
    return has and (chosen == "onednn" or (chosen == "auto" and _speedup() >= _PAYS))


@torch.no_grad()
def _speedup() -> float:
    """How many times faster oneDNN is: the best of some turns of each, on the threads that there are."""
    x, weight = torch.ones(4 * _SIDE, _SIDE), torch.ones(_SIDE, _SIDE)

    def seconds(product: Callable[..., torch.Tensor]) -> float:
        found = []
        for _ in range(12):
            started = time.perf_counter()
            product(x, weight)
            found.append(time.perf_counter() - started)
        return min(found)

    return seconds(functional.linear) / seconds(onednn_linear)
