"""Trainable copies of a frozen UNet: low-rank adapters (LoRA) on shared weights, or a full copy."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.autograd.function import once_differentiable

from diffusion_gym.models.base import ATTENTION
from diffusion_gym.models.linear import linear, product
from diffusion_gym.registry import unknown_name


class _WholeProduct(torch.autograd.Function):
    """(W + s B A) x + b for a frozen W: one product of the output's size forward and one backward, as without adapters.

    PyTorch's own gradients of the same formula would hold one for the whole of W + s B A, which nothing needs.
    """

    @staticmethod
    def forward(  # type: ignore[override]  # torch types it as variadic
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """From `(..., D)` to `(..., D')`; `down` is A `(r, D)`, `up` is B `(D', r)` and `scale` is s."""
        ctx.save_for_backward(x, weight, down, up)
        ctx.scale = scale
        return linear(x, torch.addmm(weight, up, down, alpha=scale), bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """The gradients of x, A and B for the output's."""
        x, weight, down, up = ctx.saved_tensors
        rows, out = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        whole = torch.addmm(weight, up, down, alpha=ctx.scale) if ctx.needs_input_grad[0] else None
        for_x = None if whole is None else linear(out, whole.T).view(x.shape)
        for_down = product(product(out, up.T).T, rows.T)
        for_up = product(product(rows, down).T, out.T).T
        return for_x, None, None, ctx.scale * for_down, ctx.scale * for_up, None


class AdaptedLinear(Linear):  # type: ignore[misc]  # peft has no types
    """peft's linear layer with an adapter, W x + s B (A x), computed with fewer passes over its output.

    In float32 it is (W + s B A) x, in rollouts and in training alike, so that adapters cost rollouts little while the
    importance ratio of a fresh one stays 1. In half precision the sum would round what an adapter adds away.

    It is for a single adapter without dropout; s is alpha / rank.

    Attributes:
        off: the adapter adds nothing; see `WithoutAdapters`.
    """

    off: bool = False

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """From `(..., D)` to `(..., D')` in the dtype of the base layer's output."""
        if self.disable_adapters or self.merged or self.off:
            return self.base_layer(x)
        down, up, scale = self.lora_A["default"], self.lora_B["default"], self.scaling["default"]
        types = {x.dtype, self.base_layer.weight.dtype, down.weight.dtype}
        if types == {torch.float32} and not _autocasts(x.device.type):
            return _WholeProduct.apply(x, self.base_layer.weight, self.base_layer.bias, down.weight, up.weight, scale)
        base: torch.Tensor = self.base_layer(x)
        low = down(x.to(down.weight.dtype))
        if low.dtype != base.dtype:
            return (base + scale * up(low)).to(base.dtype)
        rows, low_rows = base.reshape(-1, base.shape[-1]), low.reshape(-1, low.shape[-1])
        return torch.addmm(rows, low_rows, up.weight.T, alpha=scale).view(base.shape)


def _autocasts(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def with_lora(
    unet: nn.Module, rank: int, alpha: float | None = None, targets: Collection[str] = ATTENTION, *, given: bool = False
) -> nn.Module:
    """A UNet that shares `unet`'s weights and adds trainable adapters of `rank`; `unet` stays as it was.

    Args:
        unet: the network.
        rank: r.
        alpha: what an adapter adds is alpha / r times its product; r by default.
        targets: the linear layers that get one, by the ends of their names.
        given: whether `targets` are the user's, so that each must be there.

    Raises:
        ValueError: a rank that no layer can have; or a target that no linear layer is called.
    """
    layers = {name: layer for name, layer in unet.named_modules() if isinstance(layer, nn.Linear)}
    adapted = {name: layer for name, layer in layers.items() if any(_ends(name, target) for target in targets)}
    for target in targets if given else ():
        if not any(_ends(name, target) for name in layers):
            ends = sorted({_end(name) for name in layers})
            raise ValueError(unknown_name("lora_targets", target, ends))
    most = max((min(layer.weight.shape) for layer in adapted.values()), default=rank)
    if rank > most:
        raise ValueError(f"lora_rank={rank!r} is above {most}, the largest rank of a layer here; give at most that")
    weights: list[torch.Tensor] = [*unet.parameters(), *unet.buffers()]
    shared = copy.deepcopy(unet, {id(tensor): tensor for tensor in weights})
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        init_lora_weights="gaussian",
        target_modules=sorted(adapted),
    )
    config._register_custom_module({nn.Linear: AdaptedLinear})
    inject_adapter_in_model(config, shared)
    for name, parameter in shared.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()  # adapters train in float32 whatever the base's dtype
    return shared.eval()


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _end(name: str) -> str:
    """The name by which one targets a layer: its last part that is no number, with what follows."""
    *before, last = name.split(".")
    return f"{before[-1]}.{last}" if last.isdigit() and before else last


def adapters_of(network: nn.Module) -> dict[str, Any]:
    """The layers with adapters, by name."""
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, BaseTunerLayer)}


class WithoutAdapters(nn.Module):
    """A network with adapters as the one that they were added to: the same weights, without what the adapters add.

    Args:
        network: of `with_lora`; its attributes are this one's too.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._network = (network,)  # its parameters are not this one's

    def __getattr__(self, name: str) -> Any:
        """What the network has."""
        return getattr(self.__dict__["_network"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network gives without its adapters, without a gradient for them."""
        layers = list(adapters_of(self._network[0]).values())
        for layer in layers:
            layer.off = True
        try:
            return self._network[0](*args, **kwargs)
        finally:
            for layer in layers:
                layer.off = False


def full_copy(unet: nn.Module) -> nn.Module:
    """A trainable copy of `unet` with weights of its own."""
    return copy.deepcopy(unet).requires_grad_(True).eval()


@torch.no_grad()
def merged(unet: nn.Module) -> nn.Module:
    """A copy of `unet` without adapters, what they add being part of its weights; `unet` stays as it was."""
    plain = copy.deepcopy(unet)
    for name, layer in adapters_of(plain).items():
        layer.merge()
        plain.set_submodule(name, layer.get_base_layer())
    return plain.requires_grad_(False)
