"""Models that are in use are shared; what changed on disk is loaded anew."""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Callable, Hashable
from pathlib import Path
from threading import RLock
from typing import Any, Final
from weakref import WeakValueDictionary

from diffusion_gym.models.base import DenoisingModel

Fingerprint = tuple[tuple[str, int, int], ...]
_KEPT: Final = 2  # of models that nobody uses: a training's, while its environments come and go, and one beside it


def fingerprint(folder: str | Path) -> Fingerprint:
    """Name, size and time of the last change of the files in a pipeline's folder and its parts, links followed."""
    found = []
    for path in (*Path(folder).glob("*"), *Path(folder).glob("*/*")):
        with contextlib.suppress(FileNotFoundError):  # a link to nowhere, or gone meanwhile
            state = path.stat()
            if not stat.S_ISDIR(state.st_mode):
                found.append((str(path.relative_to(folder)), state.st_size, state.st_mtime_ns))
    return tuple(sorted(found))


class ModelCache:
    """Models by key: those in use anywhere, and the last few that were.

    A model may say where it is from: `files`, its folder and the fingerprint that this had before it was read. Once
    that differs the model is loaded anew, while whoever holds the old one keeps it.
    """

    def __init__(self) -> None:
        self._lock = RLock()  # two threads that want the same model load it once
        self._in_use: WeakValueDictionary[Hashable, Any] = WeakValueDictionary()
        self._kept: dict[Hashable, DenoisingModel] = {}

    def get(self, key: Hashable, load: Callable[[], DenoisingModel]) -> DenoisingModel:
        """The model of `key`, by `load` where there is none or its files have changed."""
        with self._lock:
            model = self._in_use.get(key, self._kept.get(key))
            if model is None or _has_changed(model):
                self._kept.pop(key, None)
                model = load()
                with contextlib.suppress(TypeError):  # of a class with __slots__, which is shared while it is kept
                    self._in_use[key] = model
            self._kept.pop(key, None)
            self._kept[key] = model  # at the end: the first is the one that was longest not asked for
            while len(self._kept) > _KEPT:
                del self._kept[next(iter(self._kept))]
            return model


def _has_changed(model: Any) -> bool:
    folder, before = getattr(model, "files", None) or (None, None)
    return folder is not None and fingerprint(folder) != before
