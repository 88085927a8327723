"""Models that are in use are shared; what changed on disk is loaded anew."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable
from threading import RLock
from typing import Any, Final
from weakref import WeakValueDictionary

from diffusion_gym.models.base import DenoisingModel
from diffusion_gym.pretrained import fingerprint

_KEPT: Final = 2  # of models that nobody uses: a training's, while its environments come and go, and one beside it


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
    holder: Any = getattr(getattr(model, "unet", None), "sharded_by", None)  # a policy, which took the weights
    if holder is not None and holder() is None:
        return True
    folder, before = getattr(model, "files", None) or (None, None)
    return folder is not None and fingerprint(folder) != before
