"""What tells the weights of a model from those of others, also once they have left the place where they were."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, Final
from weakref import WeakKeyDictionary

import torch
from torch import nn

# The policy sees the prompt through the encoders, the reward the picture through the autoencoder.
_NETWORKS: Final = ("unet", "text_encoder", "text_encoder_2", "text_encoder_3", "vae")
_SAMPLED: Final = 64  # numbers of each tensor that count
_REMEMBERED: Final[WeakKeyDictionary[nn.Module, Any]] = WeakKeyDictionary()  # by the network, which variants share


def sampled_digest(networks: Iterable[nn.Module]) -> Any:
    """SHA-256, to be added to, of the names and shapes of networks' weights and of 64 numbers of each tensor.

    So a large network costs no pass over its weights, and training changes nearly all numbers of a tensor.
    """
    digest = hashlib.sha256()
    sampled = []  # of each network on its device, of which there may be several
    for network in networks:
        samples = []
        for name, tensor in network.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            flat = tensor.detach().reshape(-1)
            samples.append(flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED].float())
        sampled.append(torch.cat(samples).cpu())
    digest.update(torch.cat(sampled).numpy().tobytes())
    return digest


def weights_digest(model: Any) -> Any:
    """`sampled_digest` of a model's networks, as they were when `remember_weights` was called, if it was."""
    known = _REMEMBERED.get(model.unet)
    networks = (getattr(model, part, None) for part in _NETWORKS)
    return sampled_digest(each for each in networks if each is not None) if known is None else known.copy()


def remember_weights(model: Any) -> None:
    """Keep a model's digest, as some of its weights are about to leave."""
    if model.unet not in _REMEMBERED:
        _REMEMBERED[model.unet] = weights_digest(model)
