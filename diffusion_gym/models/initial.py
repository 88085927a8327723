"""What training begins from in place of the pretrained model: exported adapters, or the network of a pipeline."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import convert_unet_state_dict_to_peft
from peft.utils.other import get_pattern_key
from torch import nn

from diffusion_gym.models.base import ADAPTER_FILES
from diffusion_gym.models.checkpoint import Checkpoint
from diffusion_gym.models.lora import adapters_of
from diffusion_gym.models.quiet import quiet
from diffusion_gym.models.schedulers import read_scheduler
from diffusion_gym.storage import load_tensors, parse_json, read_json, tensors_metadata

_PEFT_PREFIX: Final = "base_model.model."  # of the names that peft itself writes
_PARTS: Final = ("transformer", "unet")
_UNSUPPORTED: Final = ("use_dora", "lora_bias")
# Of a scheduler's config: how noisy a picture is at which timestep.
_NOISE: Final = (
    *("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas", "rescale_betas_zero_snr"),
)


@dataclass(frozen=True)
class Adapter:
    """What a layer's adapter adds to its weights: scale * up @ down.

    Attributes:
        down: A, float32 `(r, ...)`.
        up: B, float32 `(D', r, ...)`.
        scale: alpha / r, or alpha / sqrt(r) where the file says so.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float

    def product(self) -> torch.Tensor:
        """The change of the weights, in their shape `(D', ...)`."""
        return self.scale * torch.einsum("or,r...->o...", self.up.flatten(1), self.down)


def begin_from(
    path: str | Path, network: nn.Module, rank: int | None, prediction: str, scheduler: Mapping[str, Any] | None = None
) -> None:
    """Put exported weights into a network that trains; it stays as it was where that is refused.

    Args:
        path: adapters that this package, diffusers or peft exported, a folder or a safetensors file; or, for a network
            that trains as a whole, a pipeline folder, of which the network alone is read.
        network: of `with_lora` or `full_copy`.
        rank: of its adapters, which keep their alpha: for another one of the file the weights make up; None where all
            weights train.
        prediction: what the model predicts, `epsilon` or another, which the pipeline must predict too.
        scheduler: the model's scheduler config, complete; a pipeline must have been trained with the same noise.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: it holds neither, or what does not fit the network.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"init_from={str(path)!r} does not exist; give exported adapters or a pipeline folder")
    if (path / "model_index.json").is_file():
        if rank is not None:
            _refuse(path, "is a full pipeline, and adapters cannot hold it; use trainable='full', or take it as model=")
        changed = _of_pipeline(path, network, prediction, scheduler or {})
    elif rank is not None:
        changed = _of_adapters(path, network, rank)
    else:
        changed = _merged(path, network)
    with torch.no_grad():
        for parameter, value in changed:
            parameter.copy_(value)


def read_adapters(path: Path) -> dict[str, Adapter]:
    """The adapters of a folder or safetensors file, by the layer's name in the network.

    Raises:
        ValueError: there are none, or not of the network alone, or of a kind that is not a low-rank product.
    """
    file = path if path.is_file() else next((path / name for name in ADAPTER_FILES if (path / name).is_file()), None)
    if file is None or file.suffix != ".safetensors":
        hint = f"; give {str(path / 'model')!r}" if (path / "model").is_dir() else ""
        _refuse(path, f"holds neither {', '.join(ADAPTER_FILES)} nor model_index.json{hint}")
    stored = load_tensors(file)
    config = _config(file, peft=any(key.startswith(_PEFT_PREFIX) for key in stored))
    tensors = _named(path, stored)
    found: dict[str, Adapter] = {}
    if whole := [key for key, value in tensors.items() if not value.is_floating_point()]:
        _refuse(path, f"holds whole numbers at {_some(whole)}; save the adapters in a type of floats")
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        layer = key.removesuffix(".lora_A.weight")
        down, up = tensors.pop(key).float(), tensors.pop(f"{layer}.lora_B.weight", torch.empty(0)).float()
        if up.ndim < 2 or up.shape[1] != down.shape[0]:
            _refuse(path, f"has no matching lora_B of layer {layer!r}; export it anew")
        found[layer] = Adapter(down, up, _scale(config, layer, len(down)))
        if not bool(found[layer].product().isfinite().all()):
            _refuse(path, f"holds NaN or infinite numbers at layer {layer!r}; take a file that is whole")
    if tensors or not found:
        _refuse(path, f"holds {_some(tensors) or 'no adapter'}, which is no low-rank product of a layer's weights")
    return found


def _config(file: Path, peft: bool) -> Mapping[str, Any]:
    """What the exporter says of alpha and of the kind of adapters; nothing for files of diffusers that say nothing."""
    if peft:
        beside = file.parent / "adapter_config.json"
        if not beside.is_file():
            _refuse(file, "is of peft, which tells alpha in adapter_config.json; put that file beside it")
        config: dict[str, Any] = read_json(beside)
    else:
        stored = parse_json(tensors_metadata(file).get(LORA_ADAPTER_METADATA_KEY, "{}"))
        prefixed = {part: f"{part}." for part in _PARTS}
        config = {
            key.removeprefix(prefix): value
            for key, value in stored.items()
            for prefix in prefixed.values()
            if key.startswith(prefix)
        }
    for name in _UNSUPPORTED:
        if config.get(name):
            _refuse(file, f"has {name}={config[name]!r}, which is no low-rank product; merge it into a pipeline folder")
    return config


def _named(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors by peft's names, without the prefix that says which network they are of."""
    foreign = [key for key in tensors if key.startswith(("text_encoder", "lora_te", "lora_unet"))]
    if foreign:
        _refuse(
            path,
            f"holds {_some(foreign)}: adapters of a text encoder, which does not train, or names of another trainer; "
            "load it in diffusers and save the network's adapters alone",
        )
    prefixes = (_PEFT_PREFIX, *(f"{part}." for part in _PARTS))
    for prefix in prefixes:
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    if not any("lora_A" in key for key in tensors):
        tensors = convert_unet_state_dict_to_peft(tensors)
    alphas = {key: value for key, value in tensors.items() if key.endswith(".alpha")}
    if alphas:
        _refuse(path, f"holds {_some(alphas)}: alphas of another trainer; load it in diffusers and save it anew")
    return tensors


def _scale(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """Alpha / r of a layer, as peft computes it; 1 in files that do not tell alpha, as in diffusers."""
    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(patterns, layer), config.get("lora_alpha", rank))
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_adapters(path: Path, network: nn.Module, rank: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Weights and their new values, for a network with adapters of `rank`; layers that are not named add nothing."""
    layers = adapters_of(network)
    changed = []
    for name, adapter in read_adapters(path).items():
        if name not in layers:
            _refuse(
                path,
                f"adapts layer {name!r}, which has no adapter here; name it in lora_targets, or use trainable='full', "
                "which takes any layer",
            )
        if len(adapter.down) != rank:
            _refuse(path, f"has rank {len(adapter.down)} at layer {name!r}, and lora_rank={rank}; make them equal")
        down, up = layers[name].lora_A["default"].weight, layers[name].lora_B["default"].weight
        _require_shape(path, name, adapter.down, down)
        _require_shape(path, name, adapter.up, up)
        changed += [(down, adapter.down), (up, adapter.scale / layers[name].scaling["default"] * adapter.up)]
    return changed


def _merged(path: Path, network: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Weights and their new values, for a network that trains as a whole, with what the adapters add."""
    layers = dict(network.named_modules())
    changed = []
    for name, adapter in read_adapters(path).items():
        weight = getattr(layers.get(name), "weight", None)
        if not isinstance(weight, torch.Tensor):
            _refuse(path, f"adapts layer {name!r}, which the model does not have; is it of another model?")
        delta = adapter.product()
        _require_shape(path, name, delta, weight)
        changed.append((weight, weight.detach() + delta.to(weight)))
    return changed


def _of_pipeline(
    path: Path, network: nn.Module, prediction: str, scheduler: Mapping[str, Any]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Weights and their new values, for a network that trains as a whole, from a pipeline's network."""
    index = read_json(path / "model_index.json")
    part = next((name for name in _PARTS if (path / name).is_dir()), None)
    kind = type(network).__name__
    if part is None or index.get(part, [None, None])[1] != kind:
        _refuse(path, f"has no {kind}; use a pipeline of the same kind as the model")
    if (path / "scheduler" / "scheduler_config.json").is_file():
        # Complete; a flow's alone says nothing of these.
        _require_same_noise(path, read_scheduler(str(path), str(path), "scheduler", index), prediction, scheduler)
    own = network.state_dict()
    with quiet():
        device = next(iter(own.values())).device
        found = Checkpoint(str(path), device, torch.float32, name=str(path)).network(type(network), part).state_dict()
    if odd := sorted(found.keys() ^ own.keys()):
        _refuse(path, f"has other weights than the model, such as {_some(odd)}; use a pipeline of the same size")
    for name, value in own.items():
        _require_shape(path, name, found[name], value)
    return [(value, found[name]) for name, value in own.items()]


def _require_same_noise(path: Path, found: Mapping[str, Any], prediction: str, scheduler: Mapping[str, Any]) -> None:
    """The pipeline's network predicts the same, of pictures with the same noise at each timestep."""
    if (predicted := found.get("prediction_type", prediction)) != prediction:
        _refuse(path, f"predicts {predicted!r} and the model {prediction!r}; use a pipeline that predicts the same")
    for name in _NOISE:
        if name in found and name in scheduler and found[name] != scheduler[name]:
            _refuse(
                path,
                f"has {name}={found[name]!r} in its scheduler and the model {scheduler[name]!r}; use a pipeline with "
                "the noise of the model",
            )


def _require_shape(path: Path, name: str, given: torch.Tensor, own: torch.Tensor) -> None:
    if given.shape != own.shape:
        _refuse(
            path, f"has shape {tuple(given.shape)} at {name!r}, the model {tuple(own.shape)}; is it of another model?"
        )


def _some(names: Any) -> str:
    return ", ".join(map(repr, list(names)[:2]))


def _refuse(path: Path, why: str) -> NoReturn:
    raise ValueError(f"init_from={str(path)!r} {why}")
