"""Text embeddings of prompts: each is encoded once, kept on the host while there is room, and stored once a rollout."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Final

import torch

from diffusion_gym.devices import to_device
from diffusion_gym.models import DenoisingModel

# Bytes on the host: 9,000 prompts of Stable Diffusion 1, 390 of Stable Diffusion 3 with T5, in float32. A prompt that
# has left costs one pass of the text encoder.
CACHE_BYTES: Final = 2**31
# Bytes of a rollout's distinct prompts that may lie on the device: 1,100 prompts of Stable Diffusion 1. Those of a
# larger rollout stay on the host, and each use copies the rows that it needs.
DEVICE_BYTES: Final = 2**28


class TextEmbeddings:
    """Text embeddings `(N, L, D)` of N prompts, of which equal ones are stored once.

    Args:
        keys: what tells the prompts apart, N of them.
        rows: the embedding of each key, `(L, D)` on the host.
        device: where they are used.
    """

    def __init__(self, keys: Sequence[bytes], rows: Mapping[bytes, torch.Tensor], device: torch.device) -> None:
        self._keys, self._rows, self.device = list(keys), dict(rows), device

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, samples: torch.Tensor) -> torch.Tensor:
        """Embeddings `(M, L, D)` on the device, of samples int64 `(M,)`.

        A GPU is waited for only where there are too many distinct prompts for it.
        """
        if self._on_device is not None:
            rows, places = self._on_device
            return rows[places[samples.to(self.device)]]
        return self.part(samples.tolist()).all()

    def all(self) -> torch.Tensor:
        """Those of all samples, `(N, L, D)` on the device."""
        return to_device(torch.stack([self._rows[key] for key in self._keys]), self.device)

    @cached_property
    def _on_device(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The distinct rows and which of them each sample has; None if they are to stay on the host."""
        if sum(row.nbytes for row in self._rows.values()) > DEVICE_BYTES:
            return None
        order = {key: place for place, key in enumerate(self._rows)}
        places = torch.tensor([order[key] for key in self._keys])
        return to_device(torch.stack(list(self._rows.values())), self.device), to_device(places, self.device)

    def part(self, samples: Sequence[int]) -> TextEmbeddings:
        """Those of some samples."""
        keys = [self._keys[sample] for sample in samples]
        return TextEmbeddings(keys, {key: self._rows[key] for key in keys}, self.device)

    @staticmethod
    def join(parts: Sequence[TextEmbeddings]) -> TextEmbeddings:
        """Several one after another."""
        rows = {key: row for part in parts for key, row in part._rows.items()}
        return TextEmbeddings([key for part in parts for key in part._keys], rows, parts[0].device)


class EmbeddingCache:
    """A model's text embeddings by token ids; the ones used last stay on the host.

    Args:
        model: the model, whose text encoder is frozen.
    """

    def __init__(self, model: DenoisingModel) -> None:
        self._model = model
        self.rows: OrderedDict[bytes, torch.Tensor] = OrderedDict()  # last used last

    def find(self, tokens: torch.Tensor) -> TextEmbeddings:
        """The embeddings of token ids `(N, L)`.

        Each distinct prompt is encoded by itself: in a batch its rounding might depend on the others, and so a resumed
        run on what was encoded before.
        """
        given = tokens.cpu().contiguous()
        keys = [row.tobytes() for row in given.numpy()]
        distinct = dict(zip(keys, given, strict=True))
        rows = {key: self.rows.pop(key) for key in distinct if key in self.rows}
        if new := [key for key in distinct if key not in rows]:
            encoded = torch.cat([self._model.embed(distinct[key][None]) for key in new]).cpu()  # waits for a GPU once
            rows |= zip(new, map(torch.clone, encoded), strict=True)  # a view would keep all of them
        self.rows.update(rows)
        while len(self.rows) * rows[keys[0]].nbytes > CACHE_BYTES:
            self.rows.popitem(last=False)
        return TextEmbeddings(keys, rows, self._model.device)
