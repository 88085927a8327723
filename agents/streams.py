"""Where the randomness of a run comes from: a stream of its own for each use of a seed path."""

from __future__ import annotations

from typing import Final, Literal

import numpy as np

Use = Literal["rollout", "update", "window"]
# NumPy pads entropy with zeros, so that [s, 0, i] and [s, 0, i, 0] are one stream. What comes after a path is therefore
# either a batch's number, which is small, or this.
_TAGS: Final[dict[Use, tuple[int, ...]]] = {"rollout": (), "update": (0x75706474,), "window": (0x77696E64,)}


def stream(path: tuple[int, ...], use: Use) -> np.random.SeedSequence:
    """The randomness of one use of `path`.

    Args:
        path: such as (seed, what for, iteration), and for a rollout the batch.
        use: `rollout`, what is sampled; `update`, the order and the draws of an agent's update; or `window`, where the
            noisy steps are.
    """
    return np.random.SeedSequence([*path], spawn_key=_TAGS[use])
