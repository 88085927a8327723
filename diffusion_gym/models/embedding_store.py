"""Text embeddings on disk, one file a prompt; and text encoders that leave memory, and come back for a new prompt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from diffusion_gym.models.checkpoint import Checkpoint
from diffusion_gym.models.digest import remember_weights, sampled_digest
from diffusion_gym.pretrained import Fingerprint, fingerprint
from diffusion_gym.storage import load_tensors, save_tensors, tensors_metadata

_FORMAT: Final = "diffusion-gym embedding 1"
_LIBRARIES: Final = ("diffusers", "transformers")  # whose code encodes


class EmbeddingStore:
    """Embeddings of prompts, in a sub-folder for the text encoders that made them; several processes may share it.

    Args:
        folder: the folder; made when first written to.
        encoders: what tells the text encoders and how they are used from all others.
    """

    def __init__(self, folder: str | Path, encoders: str) -> None:
        self.folder, self.encoders = Path(folder) / encoders[:32], encoders

    def embeddings(
        self, rows: Sequence[tuple[torch.Tensor, ...]], encode: Callable[[list[int]], list[torch.Tensor]]
    ) -> torch.Tensor:
        """The embeddings `(N, L, D)` of N prompts, on the host where they come from disk.

        Args:
            rows: the token ids of each prompt, `(1, l)` of each tokenizer.
            encode: makes those at some places of `rows`, each `(1, L, D)`.

        Raises:
            ValueError: a file is damaged or of something else.
            OSError: a file cannot be written.
        """
        paths = [self._path(row) for row in rows]
        found = {place: self._read(path) for place, path in enumerate(paths) if path.is_file()}
        lacking = [place for place in range(len(rows)) if place not in found]
        for place, made in zip(lacking, encode(lacking) if lacking else [], strict=True):
            found[place] = made.cpu().contiguous()
            save_tensors(paths[place], {"embedding": found[place]}, self._told(found[place]))
        return torch.cat([found[place] for place in range(len(rows))])

    def _path(self, row: tuple[torch.Tensor, ...]) -> Path:
        tokens = json.dumps([ids.flatten().tolist() for ids in row])
        return self.folder / f"{hashlib.sha256(tokens.encode()).hexdigest()}.safetensors"

    def _read(self, path: Path) -> torch.Tensor:
        remedy = "delete that file, and the prompt is encoded again"
        try:
            tensors, told = load_tensors(path), tensors_metadata(path)
        except ValueError as error:
            raise ValueError(f"embedding_cache: {error}; {remedy}") from error
        if set(tensors) != {"embedding"} or told != self._told(tensors["embedding"]):
            raise ValueError(f"embedding_cache: {path} is not what this model's text encoders wrote; {remedy}")
        return tensors["embedding"]

    def _told(self, embedding: torch.Tensor) -> dict[str, str]:
        """What the header of a file says."""
        numbers = embedding.reshape(-1).view(torch.uint8).numpy()
        return {"format": _FORMAT, "encoders": self.encoders, "sha256": hashlib.sha256(numbers.data).hexdigest()}


class TextEncoders:
    """The text encoders of a model, which may leave memory.

    Args:
        checkpoint: where they were loaded from.
        parts: of the model, by the name of their sub-folder.
        files: the fingerprint of the folder.
    """

    def __init__(self, checkpoint: Checkpoint, parts: Mapping[str, Any], files: Fingerprint) -> None:
        self.checkpoint, self.files = checkpoint, files
        networks = {name: part for name, part in parts.items() if name.startswith("text_encoder")}
        self.parts: dict[str, nn.Module] = {name: part for name, part in networks.items() if part is not None}

    @property
    def released(self) -> bool:
        """Whether their weights have left memory."""
        return any(each.is_meta for network in self.parts.values() for each in network.parameters())

    def key(self, described: Any) -> str:
        """What tells them from all others, 64 hexadecimal digits.

        Args:
            described: what else their embeddings depend on, JSON values.
        """
        digest = sampled_digest(self.parts.values())
        libraries = {name: version(name) for name in _LIBRARIES}
        digest.update(json.dumps([_FORMAT, libraries, described], sort_keys=True, default=str).encode())
        return digest.hexdigest()

    def release(self, model: Any) -> None:
        """Have their weights leave memory; the model's fingerprint stays."""
        remember_weights(model)
        self._leave()

    def _leave(self) -> None:
        for network in self.parts.values():
            _replace(network, {id(each): torch.empty_like(each, device="meta") for each in network.parameters()})

    def restore(self) -> None:
        """Load their weights again, where they have left.

        Raises:
            ValueError: the files have changed since they were loaded first.
        """
        if not self.released:
            return
        folder = self.checkpoint.folder
        if fingerprint(folder) != self.files:
            raise ValueError(
                f"model={self.checkpoint.name!r}: its files in {folder} have changed; begin anew with them"
            )
        for part, network in self.parts.items():
            fresh = dict(self.checkpoint.network(type(network), part).named_parameters(remove_duplicate=False))
            own = network.named_parameters(remove_duplicate=False)
            _replace(network, {id(each): fresh[name].data for name, each in own})

    @contextmanager
    def present(self) -> Iterator[None]:
        """Within this context they are there; those that had left leave again."""
        away = self.released
        self.restore()
        try:
            yield
        finally:
            if away:
                self._leave()


def _replace(network: nn.Module, values: dict[int, torch.Tensor]) -> None:
    """Give the parameters of a network other numbers; one that stands in several places stays one."""
    made = {address: nn.Parameter(value, requires_grad=False) for address, value in values.items()}
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, made[id(parameter)])
