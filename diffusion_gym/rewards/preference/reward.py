"""`reward="labels.safetensors"`: the score that was fitted to people's choices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import torch

from diffusion_gym.devices import device_called
from diffusion_gym.images import to_float, to_uint8
from diffusion_gym.rewards.base import RewardOutput
from diffusion_gym.rewards.preference.bradley_terry import Posterior
from diffusion_gym.rewards.preference.features import FeatureSource, Kind, load_features
from diffusion_gym.rewards.preference.fitting import Features, Fitted, Scaling
from diffusion_gym.schemas import Positive, Schema, parse_checked
from diffusion_gym.storage import load_tensors, save_tensors, tensors_metadata

_HEADER: Final = "diffusion_gym"
_REMEDY: Final = "give a file that `diffusion-gym fit-preferences` wrote"
_TENSORS: Final = ("mean", "std", "weights")


class _Header(Schema):
    format: Literal["diffusion-gym preferences 2"] = "diffusion-gym preferences 2"
    features: Kind
    source: str
    revision: str | None = None
    variant: str | None = None
    height: Positive
    width: Positive
    answers: Positive
    accuracy: float
    accuracy_ci95: list[float]


class PreferenceReward:
    """Scores `w z`, with z the standardised features of picture and prompt and w fitted to people's choices.

    A difference of d means that people choose the higher picture with probability `1 / (1 + exp(-d))`, as far as the
    fit knows. `uncertainty` in `info` is the score's standard deviation under the fit's posterior: it grows where the
    pictures leave those that people saw.

    Args:
        file: what `diffusion-gym fit-preferences` wrote.
        device: where the features are computed; None for the images' device.
        batch_size: most pictures at once.
        pessimism: so many standard deviations are taken off the score, so that pictures unlike those that people saw do
            not pay (as in arXiv:2310.02743's uncertainty-weighted optimisation, which takes off the variance).

    Attributes:
        name: `Preferences`.
        accuracy: share of held-out choices that the fit predicts.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or of something else; an unknown device, a batch size below 1 or a negative
            `pessimism`.
    """

    name = "Preferences"

    def __init__(
        self, file: str | Path, *, device: str | None = None, batch_size: int = 64, pessimism: float = 0.0
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r} must be at least 1")
        if not (math.isfinite(pessimism) and pessimism >= 0):
            raise ValueError(f"pessimism={pessimism!r} must be a finite number, at least 0")
        if not Path(file).is_file():
            raise FileNotFoundError(
                f"reward={str(file)!r} is no file; make it with `diffusion-gym fit-preferences LABELS`"
            )
        self.file, self._batch, self._pessimism = str(file), batch_size, pessimism
        self._device = None if device is None else device_called(device)
        self._header, self._scaling, self._posterior = _read(Path(file))
        self.accuracy = self._header.accuracy
        self._features: dict[torch.device, Features] = {}

    @torch.no_grad()
    def __call__(
        self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> RewardOutput:
        """Score `images`, float `(N, 3, H, W)` in [0, 1], made for N `prompts`.

        Raises:
            ValueError: the pictures are of another size than those that people saw.
        """
        size = (self._header.height, self._header.width)
        if tuple(images.shape[2:]) != size:
            raise ValueError(
                f"reward={self.file!r} was fitted to pictures of {size[0]} x {size[1]} pixels of "
                f"{self._header.source!r}, and these have {images.shape[2]} x {images.shape[3]}; label pictures of it"
            )
        device = self._device or images.device
        # People saw 8 bits, and a saved picture scores as it did in training.
        seen = to_float(to_uint8(images)).to(device)
        if device not in self._features:
            self._features[device] = load_features(_source(self._header), device)
        parts = [
            self._features[device](seen[start : start + self._batch], prompts[start : start + self._batch])
            for start in range(0, len(images), self._batch)
        ]
        scaled = self._scaling(torch.cat(parts).cpu())
        scores, spread = scaled @ self._posterior.weights, self._posterior.spread(scaled)
        scores = scores - self._pessimism * spread
        return RewardOutput(scores.float().to(images.device), {"uncertainty": spread.float().to(images.device)})


def save_fitted(path: Path, fitted: Fitted, source: FeatureSource, size: Sequence[int]) -> None:
    """Write a reward file.

    Args:
        path: where.
        fitted: the head.
        source: its features.
        size: height and width of the pictures.
    """
    header = _Header(
        **vars(source),
        height=size[0],
        width=size[1],
        answers=fitted.answers,
        accuracy=fitted.accuracy,
        accuracy_ci95=list(fitted.interval),
    )
    tensors = {
        "mean": fitted.scaling.mean,
        "std": fitted.scaling.std,
        "weights": fitted.posterior.weights,
        "covariance": fitted.posterior.covariance,
    }
    save_tensors(path, tensors, {_HEADER: header.model_dump_json()})


def _read(path: Path) -> tuple[_Header, Scaling, Posterior]:
    tensors, told = load_tensors(path), tensors_metadata(path)
    if _HEADER not in told:
        raise ValueError(f"reward={str(path)!r} is a file of other tensors; {_REMEDY}")
    header = parse_checked(_Header, told[_HEADER], f"reward={str(path)!r}", _REMEDY)
    width = len(tensors["weights"]) if "weights" in tensors else 0
    shapes = {**dict.fromkeys(_TENSORS, (width,)), "covariance": (width, width)}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if found != shapes or not all(bool(value.isfinite().all()) for value in tensors.values()) or not width:
        raise ValueError(f"reward={str(path)!r} holds tensors {found}, not finite ones of {list(shapes)}; {_REMEDY}")
    values = {name: value.double() for name, value in tensors.items()}
    scaling, posterior = Scaling(values["mean"], values["std"]), Posterior(values["weights"], values["covariance"])
    return header, scaling, posterior


def _source(header: _Header) -> FeatureSource:
    return FeatureSource(header.features, header.source, header.revision, header.variant)
