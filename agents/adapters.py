"""What the adapters of Stable-Baselines3 and Tianshou share: layers of an environment, infos, the steps that train."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch

SINGLE_SPACES: Final = {"observation_space": "single_observation_space", "action_space": "single_action_space"}


def layers(env: Any) -> Iterator[Any]:
    """The wrappers of an environment from the outermost, then the environment itself."""
    layer = env
    while layer is not env.unwrapped:
        yield layer
        layer = layer.env
    yield layer


def to_numpy(value: Any) -> Any:
    """A tensor on the host as an array; anything else as NumPy makes an array of it."""
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def info_rows(infos: Mapping[str, Any], ids: np.ndarray, without: Collection[str] = ()) -> list[dict[str, Any]]:
    """Gymnasium's infos of a batch, with their `_key` masks, as one dictionary for each env of `ids`.

    Args:
        infos: a dictionary of arrays, tensors and such dictionaries, an entry an env.
        ids: envs, int64 `(M,)`.
        without: keys to leave out.
    """
    rows: list[dict[str, Any]] = [{} for _ in ids]
    for key, value in infos.items():
        if key.startswith("_") or key in without:
            continue
        parts = info_rows(value, ids, without) if isinstance(value, dict) else to_numpy(value)[ids]  # one transfer
        known = infos.get(f"_{key}")
        there = np.ones(len(ids), dtype=bool) if known is None else known[ids]
        for index in np.flatnonzero(there):
            rows[index][key] = parts[index]
    return rows


def chosen_steps(stochastic: torch.Tensor, horizon: int, part: Sequence[float]) -> torch.Tensor:
    """The stochastic steps in a part of the trajectory, int64.

    Args:
        stochastic: the steps with sigma > 0.
        horizon: T.
        part: first and last, as fractions of T; 0 is the noise.

    Raises:
        ValueError: `part` is no interval of [0, 1], or holds no such step.
    """
    first, last = part
    chosen = stochastic[(stochastic >= first * horizon) & (stochastic < last * horizon)]
    if not 0 <= first < last <= 1 or len(chosen) == 0:
        raise ValueError(
            f"trained_steps={tuple(part)} must be two fractions of T={horizon}, 0 <= first < last <= 1, with a "
            "stochastic step between them"
        )
    return chosen
