"""Numbers that must be finite: what updates leave; and options, which must be within their ranges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args

import torch


class Diverged(RuntimeError):
    """An update left weights or moments of the optimiser that are NaN or infinite."""


def all_finite(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether no tensor holds NaN or infinity; a GPU is waited for once."""
    devices: dict[torch.device, list[torch.Tensor]] = {}
    for value in tensors:
        if value.is_floating_point() and value.numel():
            devices.setdefault(value.device, []).append(value.detach())
    largest = [torch.stack([n.double() for n in torch._foreach_norm(group, torch.inf)]) for group in devices.values()]
    return all(bool(norms.isfinite().all()) for norms in largest)


@dataclass(frozen=True)
class Options:
    """A dataclass of options, each with its one default and its range; dataclasses of more of them derive from it.

    Raises:
        ValueError: a number that is NaN or infinite, also in a tuple: the option, its value and what to give.
    """

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, float) and not math.isfinite(number):
                    raise ValueError(f"{entry.name}={value!r} must be finite; for no bound give a large number")


def require(options: Any, condition: str, *names: str) -> None:
    """Refuse options out of their range; NaN is out of every range.

    Args:
        options: whose attributes they are.
        condition: `larger than 0`, `at least 0`, `at least 1` or `at least 0 and less than 1`.
        names: of the options.

    Raises:
        ValueError: the option, its value and the range.
    """
    for name in names:
        value = getattr(options, name)
        within = value > 0 if condition == "larger than 0" else value >= (1 if condition == "at least 1" else 0)
        if not within or (condition.endswith("less than 1") and not value < 1):
            raise ValueError(f"{name}={value!r} must be {condition}")


def require_choice(options: Any, name: str, choices: Any) -> None:
    """Refuse an option that is none of the values of a `Literal`.

    Args:
        options: whose attribute it is.
        name: of the option.
        choices: the `Literal`.

    Raises:
        ValueError: the option, its value and the choices.
    """
    if getattr(options, name) not in get_args(choices):
        raise ValueError(f"{name}={getattr(options, name)!r} must be one of {', '.join(get_args(choices))}")
