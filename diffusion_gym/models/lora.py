"""Trainable copies of a frozen UNet: low-rank adapters (LoRA) on shared weights, or a full copy."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import nn

from diffusion_gym.quiet import quiet

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # the attention projections, as in diffusers and ddpo-pytorch


class AdaptedLinear(Linear):  # type: ignore[misc]  # peft has no types
    """peft's linear layer with an adapter, W x + B (A x), computed with one pass less over its output.

    It is for a single adapter with alpha = rank, whose scaling is 1, and without dropout.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """From `(..., D)` to `(..., D')` in the dtype of the base layer's output."""
        base: torch.Tensor = self.base_layer(x)
        if self.disable_adapters or self.merged:
            return base
        down, up = self.lora_A["default"], self.lora_B["default"]
        low = down(x.to(down.weight.dtype))
        if low.dtype != base.dtype:
            return (base + up(low)).to(base.dtype)
        rows, low_rows = base.reshape(-1, base.shape[-1]), low.reshape(-1, low.shape[-1])
        return torch.addmm(rows, low_rows, up.weight.T).view(base.shape)


def with_lora(unet: nn.Module, rank: int) -> nn.Module:
    """A UNet that shares `unet`'s weights and adds trainable adapters of `rank`; `unet` stays as it was."""
    weights: list[torch.Tensor] = [*unet.parameters(), *unet.buffers()]
    shared = copy.deepcopy(unet, {id(tensor): tensor for tensor in weights})
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(TARGETS))
    config._register_custom_module({nn.Linear: AdaptedLinear})
    inject_adapter_in_model(config, shared)
    for name, parameter in shared.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()  # adapters train in float32 whatever the base's dtype
    return shared.eval()


def full_copy(unet: nn.Module) -> nn.Module:
    """A trainable copy of `unet` with weights of its own."""
    return copy.deepcopy(unet).requires_grad_(True).eval()


@torch.no_grad()
def merged(unet: nn.Module) -> nn.Module:
    """A copy of `unet` without adapters, what they add being part of its weights; `unet` stays as it was."""
    plain = copy.deepcopy(unet)
    layers = {name: layer for name, layer in plain.named_modules() if isinstance(layer, BaseTunerLayer)}
    for name, layer in layers.items():
        layer.merge()
        plain.set_submodule(name, layer.get_base_layer())
    return plain.requires_grad_(False)


@contextmanager
def adapters_merged(unet: nn.Module) -> Iterator[None]:
    """Within this context what the adapters of `unet` add is part of its weights, for use without gradients.

    The weights that it shares with the pretrained network stay as they are: the layers with adapters get copies.
    """
    layers = [layer for layer in unet.modules() if isinstance(layer, BaseTunerLayer)]
    shared = [layer.get_base_layer().weight for layer in layers]
    try:
        for layer, weight in zip(layers, shared, strict=True):
            with torch.no_grad():
                whole = weight + cast(Any, layer).get_delta_weight(layer.active_adapters[0]).to(weight.dtype)
            layer.get_base_layer().weight = nn.Parameter(whole, requires_grad=False)
            layer._disable_adapters = True
        yield
    finally:
        for layer, weight in zip(layers, shared, strict=True):
            layer.get_base_layer().weight = weight
            layer._disable_adapters = False


def save_lora(folder: str | Path, unet: nn.Module) -> None:
    """Write the adapters so that diffusers' `pipe.load_lora_weights(folder)` reads them."""
    with quiet():
        from diffusers import StableDiffusionPipeline
        from diffusers.utils import convert_state_dict_to_diffusers

        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
        StableDiffusionPipeline.save_lora_weights(str(folder), unet_lora_layers=layers, safe_serialization=True)
