"""Options of an agent that nothing reads beside the others: given on a command line they are a mistake."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

# What is read only with another option at this value.
_READ_WITH: Final[Mapping[str, tuple[str, str]]] = {
    **dict.fromkeys(("lora_rank", "lora_alpha", "lora_targets"), ("trainable", "lora")),
    **dict.fromkeys(
        ("warmup_fraction", "first_learning_rate", "last_learning_rate"), ("learning_rate_schedule", "warmup_cosine")
    ),
    **dict.fromkeys(("window_every", "window_stride"), ("noise_window", "sliding")),
    "skip_equal_groups": ("normalization", "group"),
    "divergence_bound": ("trust_region", "divergence"),
}


def unread(options: Any) -> list[str]:
    """The names of an agent's options that nothing reads beside the others."""
    return [
        name
        for name, (other, value) in _READ_WITH.items()
        if hasattr(options, name) and getattr(options, other, value) != value
    ]


def check_read(start: Any, given: Any) -> None:
    """Refuse an option that the command line changes and that nothing reads beside the others.

    Args:
        start: the agent's options before the command line; what a preset gives and nothing reads is no mistake.
        given: and after it.

    Raises:
        ValueError: such an option; it names the one to give too.
    """
    for name in unread(given):
        other, value = _READ_WITH[name]
        if getattr(given, name) != getattr(start, name):
            option, needed = (f"--agent.{word.replace('_', '-')}" for word in (name, other))
            raise ValueError(
                f"{name}={getattr(given, name)!r} is read with {other}={value} alone, and {other} is "
                f"{getattr(given, other)!r}; give {needed} {value} too, or leave {option} out"
            )
