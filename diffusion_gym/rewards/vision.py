"""What the rewards with a vision model share: one copy of the weights a device, scoring in parts."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from diffusion_gym.hub import located
from diffusion_gym.pretrained import Fingerprint, fingerprint, load_network
from diffusion_gym.rewards.base import RewardOutput

Score = Callable[[torch.Tensor, Sequence[str]], Mapping[str, torch.Tensor]]
_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class VisionReward:
    """Scores pictures by a vision model, in parts of `batch_size`.

    Args:
        name: the reward's name.
        preprocessing: makes pixel values `(n, 3, h, w)` of images.
        score: `(pixel values, prompts)` of a part -> `score` and the components by name, each `(n,)`.
        device: where the model runs; None for the images' device.
        batch_size: most pictures at once, which bounds the memory.

    Attributes:
        differentiable: the scores have a gradient where the pictures have one.

    Raises:
        ValueError: an unknown device, or a batch size below 1.
    """

    differentiable = True

    def __init__(
        self,
        name: str,
        preprocessing: Callable[[torch.Tensor], torch.Tensor],
        score: Score,
        *,
        device: str | torch.device | None = None,
        batch_size: int = 32,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r} must be at least 1")
        self.name = name
        self.preprocessing = preprocessing
        self.score = score
        self.device = None if device is None else checked_device(device)
        self.batch_size = batch_size

    def __call__(
        self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> RewardOutput:
        """Score `images`, float `(N, 3, H, W)` in [0, 1], made for N `prompts`; all outputs are float32 `(N,)`."""
        parts = []
        with torch.set_grad_enabled(images.requires_grad and torch.is_grad_enabled()):
            for start in range(0, len(images), self.batch_size):
                rows = slice(start, start + self.batch_size)
                pixels = self.preprocessing(images[rows].to(self.device or images.device))
                parts.append(self.score(pixels, list(prompts[rows])))
        joined = {name: torch.cat([part[name].float() for part in parts]).to(images.device) for name in parts[0]}
        return RewardOutput(joined.pop("score"), joined)


class SharedNetwork:
    """A frozen network that goes to the device where it is first used; a second device gets a copy of its own.

    Attributes:
        config: of a network of transformers; None of others.
    """

    def __init__(self, network: nn.Module) -> None:
        self.config: Any = getattr(network, "config", None)
        self._copies = {torch.device("cpu"): network.eval().requires_grad_(False)}
        self._lock = threading.Lock()

    def on(self, device: torch.device) -> Any:
        """The network on `device`."""
        with self._lock:
            if device not in self._copies:
                unused = self._copies.pop(torch.device("cpu"), None)
                network = unused if unused is not None else copy.deepcopy(next(iter(self._copies.values())))
                self._copies[device] = network.to(device)
            return self._copies[device]


def checked_dtype(dtype: str) -> torch.dtype:
    """The torch type of the name `dtype`.

    Raises:
        ValueError: no such type.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def checked_device(device: str | torch.device) -> torch.device:
    """The device called `device`, with its number.

    Raises:
        ValueError: it is not here.
    """
    try:
        return torch.empty(0, device=device).device  # "cuda" becomes "cuda:0", as the images' device reads
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={str(device)!r} is not available here; use None, 'cpu' or 'cuda:0'") from error


def pretrained(network_class: str, source: str, dtype: str, *, argument: str) -> tuple[SharedNetwork, str]:
    """A network of transformers, loaded once a process, and the directory it came from.

    Args:
        network_class: a class of transformers, such as `CLIPModel`.
        source: a local directory or a hub id.
        dtype: `float32`, `bfloat16` or `float16`.
        argument: what the user calls `source`, for errors.

    Raises:
        FileNotFoundError: the files are not here and cannot be fetched.
        ValueError: an unknown dtype, or the files are of another network.
    """
    type_ = checked_dtype(dtype)
    folder = located(source, argument=argument)
    for needed in ("config.json", "*.safetensors"):
        if not any(Path(folder).glob(needed)):
            raise FileNotFoundError(
                f"{argument}={source!r} lacks {needed}; pass what transformers' save_pretrained wrote"
            )
    return _loaded(network_class, folder, type_, fingerprint(folder)), folder


@lru_cache(maxsize=8)
def _loaded(network_class: str, folder: str, dtype: torch.dtype, files: Fingerprint) -> SharedNetwork:
    import transformers

    network = load_network(getattr(transformers, network_class), folder, argument=repr(folder), use_safetensors=True)
    scales = {name: value.detach().clone() for name, value in network.named_parameters() if value.ndim == 0}
    network.to(dtype)
    for name, value in scales.items():  # a factor of all scores, such as CLIP's, keeps its digits
        network.get_parameter(name).data = value.float()
    return SharedNetwork(network)
