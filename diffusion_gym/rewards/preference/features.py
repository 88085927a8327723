"""What a fitted reward sees of a picture and its prompt: numbers that a frozen network gives of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch

from diffusion_gym.config import SamplerConfig
from diffusion_gym.models.middle import middle_block, middle_features
from diffusion_gym.rewards.preference.labels import Source

Kind = Literal["denoiser", "clip"]
_STEPS: Final = 20  # of the table in which the noise level is looked up
_NOISE: Final = 0.1  # of the schedule's time
_PARTS: Final = 2  # along height and width: where things are is lost in one mean over the picture
_DRAWS: Final = 2  # of noise, whose features are averaged


@dataclass(frozen=True)
class FeatureSource:
    """Which network: `denoiser`, a diffusion model by name, directory or hub id, or `clip`, a CLIPModel."""

    features: Kind
    source: str
    revision: str | None = None
    variant: str | None = None


def feature_source(features: str, labelled: Source) -> FeatureSource:
    """What `features`, `denoiser` or a CLIPModel by directory or hub id, means for pictures of a model."""
    if features == "denoiser":
        return FeatureSource("denoiser", labelled.model, labelled.revision, labelled.variant)
    return FeatureSource("clip", features)


def load_features(source: FeatureSource, device: torch.device) -> Any:
    """The features of pictures `(n, 3, H, W)` in [0, 1] on `device` and n prompts, as a function to float32 `(n, D)`.

    Raises:
        ValueError: the model cannot be used.
        FileNotFoundError: its files are not here and cannot be fetched.
    """
    if source.features == "clip":
        return ClipFeatures(source.source)
    from diffusion_gym.models import load_model

    named = {"revision": source.revision, "variant": source.variant}
    given = {name: value for name, value in named.items() if value is not None}
    return DenoiserFeatures(load_model(source.source, device, "float32", given))


class ClipFeatures:
    """CLIP's embedding of the picture, and its product with that of the prompt, number by number.

    Args:
        clip: a `CLIPModel`, a directory or a hub id.
    """

    def __init__(self, clip: str) -> None:
        from diffusion_gym.rewards.clip import load_clip

        self._tower = load_clip(clip, "float32", argument="features")

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Float32 `(n, 2 D)`."""
        seen = self._tower.image_embeddings(self._tower.preprocessing(images))
        return torch.cat([seen, seen * self._tower.text_embeddings(prompts, images.device)], dim=1)


class DenoiserFeatures:
    """What the pretrained network makes of a picture that is noised anew, with the prompt and without.

    The picture gets the noise of 0.1 of the schedule, the same for every picture; the features are the means over each
    quarter of the picture of the network's middle block with the prompt, and what they differ by from those with the
    empty prompt (diffusion models' inner activations as image features: arXiv:2112.03126). Of a transformer it is the
    middle one of its blocks, whose tokens of the picture lie in quarters too.

    Args:
        model: a diffusion model of prompts, with an autoencoder that encodes, and a UNet or a transformer.

    Raises:
        ValueError: it is another model.
    """

    def __init__(self, model: Any) -> None:
        if not model.prompt_length or middle_block(model.unet) is None or not _encodes(model):
            raise ValueError(
                "features='denoiser' needs a text-to-image model with an autoencoder that encodes pictures, "
                f"and a UNet or a transformer, which {model.name!r} is not; give a CLIPModel, a directory or a hub id"
            )
        self._model = model
        table = model.step_table(SamplerConfig.from_options({"num_inference_steps": _STEPS}, model.sampler_defaults))
        step = int((table.timesteps - _NOISE * model.num_train_timesteps).abs().argmin())
        self._timestep = table.network_timesteps[step].to(model.device)
        self._signal, self._share = float(table.signal[step]), float(table.noise[step])
        noise = torch.randn(_DRAWS, *model.latent_shape, generator=torch.Generator().manual_seed(0))
        self._noise = noise.to(model.device)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Float32 `(n, 8 D)` for a middle block of D channels."""
        model, latents = self._model, self._model.encode(images)
        given = model.embed(model.tokenize(prompts))
        null = model.embed(model.tokenize([""])).expand(len(given), *given.shape[1:])
        sums = []
        for condition in (given, null):
            noisy = (self._signal * latents + self._share * eps for eps in self._noise)
            times = self._timestep.expand(len(latents))
            sums.append(torch.stack([middle_features(model, x, times, condition, _PARTS) for x in noisy]).mean(0))
        return torch.cat([sums[0], sums[0] - sums[1]], dim=1)


def _encodes(model: Any) -> bool:
    """Whether a model makes latents of pictures as its network takes them; some autoencoders have another form."""
    if not hasattr(model, "encode"):
        return False
    height, width, _ = model.image_shape
    try:
        latents = model.encode(torch.zeros(1, 3, height, width))
    except (AttributeError, IndexError, RuntimeError, ValueError):
        return False
    return latents.shape[1:] == torch.Size(model.latent_shape)
