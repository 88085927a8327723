"""The pretrained network beside a full copy of it: on a GPU its weights wait on the host until somebody runs it.

Only agents with a penalty for the distance to it, and measures, ever do.
"""

from __future__ import annotations

from typing import Final
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from diffusion_gym.models import DenoisingModel

_WAITING: Final[WeakKeyDictionary[nn.Module, RemovableHandle]] = WeakKeyDictionary()
_SHARED: Final[WeakSet[nn.Module]] = WeakSet()  # adapters use their weights, which must stay where they are


def set_aside(model: DenoisingModel) -> None:
    """Move a model's network to the host until it is run, which moves it back for as long as this is not called again.

    A network on the CPU, and one whose weights adapters share, stays as it is.
    """
    network, device = model.unet, model.device
    if device.type == "cpu" or network in _SHARED or network in _WAITING:
        return
    network.to("cpu")
    _WAITING[network] = network.register_forward_pre_hook(lambda module, given: bring_back(module, device))


def bring_back(network: nn.Module, device: torch.device) -> None:
    """Move a network that was set aside to its device."""
    if (hook := _WAITING.pop(network, None)) is not None:
        hook.remove()
        network.to(device)


def keep_shared(network: nn.Module) -> None:
    """Have a network stay on its device from now on: adapters share its weights."""
    _SHARED.add(network)
