"""Prompts of the benchmark suite `shapes-v1`: four a family that the embedded model often gets wrong, four held out.

A handful of prompts is what some thousand reward queries can teach; the families' full sets are in `shapes.py`.
"""

from __future__ import annotations

from typing import Final

from diffusion_gym.prompts.base import PROMPTS, PromptSet

_TRAINED: Final = {
    "color": ("a red star", "a green star", "a blue star", "a cyan star"),
    "count": ("four red triangles", "four squares", "four green triangles", "three circles"),
    "composition": (
        "a purple square and a purple circle",
        "a red star and a red triangle",
        "a blue star and a cyan star",
        "a yellow star and a red triangle",
    ),
}
_HELD_OUT: Final = {
    "color": ("a purple star", "a yellow star", "a cyan circle", "a green square"),
    "count": ("four circles", "four yellow squares", "four blue triangles", "three purple squares"),
    "composition": (
        "a cyan circle and a cyan square",
        "a green triangle and a red star",
        "a yellow star and a yellow triangle",
        "a green star and a green square",
    ),
}

for _family, _prompts in _TRAINED.items():
    PROMPTS.register(f"shapes-{_family}-4")(
        lambda family=_family, prompts=_prompts: PromptSet(
            f"shapes-{family}-4", prompts, _HELD_OUT[family], source="ours, suite `shapes-v1`"
        )
    )
