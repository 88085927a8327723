"""A pipeline directory: its networks and tokenizers, each refused where it is not what the model takes it for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from diffusion_gym.models.linear import with_fast_linear
from diffusion_gym.models.quiet import quiet
from diffusion_gym.pretrained import load_network
from diffusion_gym.storage import read_json

_VOCABULARIES: Final = ("tokenizer.json", "vocab.json", "spiece.model")


@dataclass(frozen=True)
class Checkpoint:
    """A pipeline directory, and how its networks are loaded.

    Attributes:
        folder: the directory.
        device: where the weights go.
        dtype: type of the weights.
        variant: such as `fp16`: the weight files to take where a part has them.
        name: what the user calls it, for errors.
        text_device: where text encoders go; `device` by default.
        network_device: where the network that trains goes, a `unet` or `transformer`; `device` by default.
    """

    folder: str
    device: torch.device
    dtype: torch.dtype
    variant: str | None = None
    name: str = ""
    text_device: torch.device | None = None
    network_device: torch.device | None = None

    @property
    def index(self) -> dict[str, Any]:
        """What `model_index.json` says: the classes of the parts, and the pipeline's own options; {} without one."""
        path = Path(self.folder, "model_index.json")
        return read_json(path) if path.is_file() else {}

    def part(self, kind: str, part: str) -> Any:
        """The network or tokenizer in sub-folder `part`, of a class of diffusers or transformers by its name."""
        import diffusers
        import transformers

        found = getattr(diffusers, kind, None) or getattr(transformers, kind, None)
        if found is None:
            raise ValueError(
                f"model={self.name!r} needs {kind}, which neither diffusers {diffusers.__version__} nor transformers "
                f"{transformers.__version__} has; install newer ones"
            )
        return self.tokenizer(found, part) if part.startswith("tokenizer") else self.network(found, part)

    def network(self, kind: Any, part: str) -> Any:
        """The network in sub-folder `part`, of a class of diffusers or transformers, frozen and in eval mode.

        Raises:
            ValueError: it is of another class, or its files do not hold just its weights.
        """
        from diffusers import ModelMixin

        self._require(part, [kind.__name__])
        option = "torch_dtype" if issubclass(kind, ModelMixin) else "dtype"
        has_variant = self.variant and any(Path(self.folder, part).glob(f"*.{self.variant}*.safetensors"))
        options: dict[str, Any] = {
            option: self.dtype,
            "variant": self.variant if has_variant else None,
            "use_safetensors": True,
        }
        with quiet():
            network = load_network(kind, self.folder, argument=f"model={self.name!r}", part=part, **options)
        device = self._place(part)
        # On a CPU convolutions are a little faster so (benchmarks/layout.py); a GPU's were not measured.
        flat = device.type == "cpu" and all(weight.ndim < 5 for weight in network.parameters())
        layout = torch.channels_last if flat else torch.preserve_format
        return with_fast_linear(network.to(device, memory_format=layout)).requires_grad_(False).eval()

    def _place(self, part: str) -> torch.device:
        if part.startswith("text_encoder"):
            return self.text_device or self.device
        return (self.network_device or self.device) if part in ("unet", "transformer") else self.device

    def tokenizer(self, kind: Any, part: str) -> Any:
        """The tokenizer in sub-folder `part`, of a class of transformers.

        Raises:
            ValueError: it is of another class, has no vocabulary, or cannot be read.
        """
        plain = kind.__name__.removesuffix("Fast")
        self._require(part, [plain, f"{plain}Fast"])
        # transformers 5 would make an empty tokenizer of a tokenizer_config.json alone.
        if not any(Path(self.folder, part, name).is_file() for name in _VOCABULARIES):
            raise ValueError(f"model={self.name!r} has no vocabulary in {part}/; it needs {' or '.join(_VOCABULARIES)}")
        try:
            return kind.from_pretrained(self.folder, subfolder=part, local_files_only=True)
        except Exception as error:  # many kinds; each means: not the files of a tokenizer
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"model={self.name!r}: {part}/ cannot be loaded as {kind.__name__} ({reason})") from error

    def tokenizer_files(self) -> dict[str, bytes]:
        """The files of all tokenizers, by `part/name`: an export hands them on as they are."""
        files = (path for path in sorted(Path(self.folder).glob("tokenizer*/*")) if path.is_file())
        return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in files}

    def _require(self, part: str, kinds: Sequence[str]) -> None:
        """Refuse a part that the index, or else its own config, says is of another class."""
        index = self.index
        if part in index:
            entry = index[part]
            found = entry[1] if isinstance(entry, list) and len(entry) == 2 else entry
        else:
            path = Path(self.folder, part, "config.json")
            config = read_json(path) if path.is_file() else {}
            found = config.get("_class_name", kinds[0]) if isinstance(config, dict) else config
        if found not in kinds:
            raise ValueError(
                f"model={self.name!r} has {found!r} as {part or 'network'}; use a pipeline with a {' or '.join(kinds)}"
            )


def sides(size: Any, model: str) -> tuple[int, int]:
    """Height and width of what a network makes, from its `sample_size`: a number, or both.

    Raises:
        ValueError: it is neither.
    """
    both = list(size) if isinstance(size, Iterable) and not isinstance(size, str) else [size, size]
    if len(both) != 2 or not all(isinstance(side, int) and side > 0 for side in both):
        raise ValueError(
            f"model={model!r} has sample_size={size!r} in its network's config.json; write there the height and width "
            "that it was trained at, such as 64"
        )
    return both[0], both[1]


def token_limit(tokenizer: Any, encoder: Any, model: str) -> int:
    """Tokens of a prompt: what the tokenizer says, where it says something, and what the encoder has positions for.

    Raises:
        ValueError: the tokenizer has more tokens than the encoder knows.
    """
    if len(tokenizer) > encoder.config.vocab_size:
        raise ValueError(
            f"model={model!r}: a tokenizer of {len(tokenizer)} tokens stands before a text encoder of "
            f"{encoder.config.vocab_size}; put the tokenizer there that the encoder was trained with"
        )
    return min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
