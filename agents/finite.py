"""Numbers that must be finite: what updates leave, and options within their ranges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch


class Diverged(RuntimeError):
    """An update left weights or moments of the optimiser that are NaN or infinite."""


def all_finite(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether no tensor holds NaN or infinity; a GPU is waited for once."""
    devices: dict[torch.device, list[torch.Tensor]] = {}
    for value in tensors:
        if value.is_floating_point() and value.numel():
            devices.setdefault(value.device, []).append(value.detach())
    largest = [torch.stack([norm.double() for norm in torch._foreach_norm(own, torch.inf)]) for own in devices.values()]
    return all(bool(norms.isfinite().all()) for norms in largest)


def require_finite_options(options: Any) -> None:
    """Refuse a dataclass of options with a number that is NaN or infinite, also in a tuple.

    Raises:
        ValueError: the option, its value and what to give.
    """
    for entry in fields(options):
        value = getattr(options, entry.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{entry.name}={value!r} must be finite; for no bound give a large number")


def require(options: Any, condition: str, *names: str) -> None:
    """Refuse options out of their range; NaN is out of every range.

    Args:
        options: whose attributes they are.
        condition: `larger than 0`, `at least 0` or `at least 0 and less than 1`.
        names: of the options; a tuple's entries are all checked.

    Raises:
        ValueError: the option, its value and the range.
    """
    for name in names:
        value = getattr(options, name)
        for number in value if isinstance(value, tuple) else (value,):
            if not (number > 0 if condition == "larger than 0" else 0 <= number) or (
                condition.endswith("less than 1") and not number < 1
            ):
                raise ValueError(f"{name}={value!r} must be {condition}")
