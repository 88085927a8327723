"""Keeps the chatter of diffusers and transformers off the console while a model is loaded or saved."""

from __future__ import annotations

from contextlib import AbstractContextManager

from diffusion_gym import quiet as base


def quiet() -> AbstractContextManager[None]:
    """As `diffusion_gym.quiet.quiet`, for both libraries."""
    from diffusers.utils import logging

    return base.quiet(logging)
