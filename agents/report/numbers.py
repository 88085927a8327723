"""Numbers for people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from diffusion_gym.storage import number_or_nan

_ROUNDING: Final = 1e-15  # of a difference of two numbers about 1


def number(value: float | None, sign: str = "") -> str:
    """A number for people: three decimals, or as many as a large or tiny one needs; `sign="+"` shows a plus.

    A dash is shown for NaN, infinity and None, which is how a file holds them, and 0 for what rounding leaves of it.
    """
    if value is None or not math.isfinite(value):
        return "–"
    value = value if abs(value) >= _ROUNDING else 0.0
    size = abs(value)
    form = ",.1f" if size >= 100 else ".3f" if size >= 5e-4 or not size else ".4f" if size >= 5e-5 else ".1e"
    return f"{value:{sign if value else ''}{form}}".replace("-", "−")


def percent(value: float | None, sign: str = "") -> str:
    """A share in [0, 1] in percent or, with `sign="+"`, a difference of two in percentage points; see `number`."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{100 * value:{sign if value else ''}.1f}\N{NO-BREAK SPACE}{'pp' if sign else '%'}".replace("-", "−")


def change(before: float | None, after: float | None) -> float:
    """How much a value grew, 0 for a rounding error; NaN where either is missing."""
    first, last = number_or_nan(before), number_or_nan(after)
    return 0.0 if math.isclose(first, last, rel_tol=1e-6) else last - first


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and the up to `window - 1` values before it."""
    parts = [values[max(0, end - window) : end] for end in range(1, len(values) + 1)]
    return [sum(part) / len(part) for part in parts]


def window_for(number: int) -> int:
    """How many of `number` values a running mean takes together."""
    return max(1, min(20, number // 8))
