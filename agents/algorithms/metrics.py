"""The metrics of an iteration: means over its updates."""

from __future__ import annotations

from warnings import warn

import torch

Metrics = dict[str, float]


def averages(rows: list[dict[str, torch.Tensor]]) -> Metrics:
    """Means over the updates of an iteration; a GPU is waited for once."""
    columns = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    devices = {key: column.device for key, column in columns.items()}
    means: Metrics = {}
    for device in set(devices.values()):
        keys = [key for key in columns if devices[key] == device]
        values = torch.stack([columns[key].double() for key in keys]).cpu()
        means |= {key: float(value.mean()) for key, value in zip(keys, values, strict=True)}
    return {key: means[key] for key in rows[0]}


def update_metrics(rows: list[dict[str, torch.Tensor]]) -> Metrics:
    """`averages` of an iteration's updates, how many there were (`updates`) and were left out (`updates_skipped`).

    An update is left out where float16 gradients overflow. Warns where that happened to all of them.
    """
    means = averages(rows)
    skipped = round(means.get("overflow", 0.0) * len(rows))
    if skipped == len(rows):
        warn(
            f"all {skipped} updates of the iteration were skipped, because float16 gradients overflowed: nothing was "
            "learned. Each halves the loss scale, which begins at 65,536, so that the first ones may be lost; if it "
            "goes on, use mixed_precision='bf16' or 'no'",
            RuntimeWarning,
            stacklevel=2,
        )
    return {**means, "updates": len(rows), "updates_skipped": skipped}
