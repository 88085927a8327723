"""The tokens that rewards send, and the addresses that may have them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from urllib.parse import urlsplit

_DEFAULT_PORTS = {"http": 80, "https": 443}
_allowed: frozenset[tuple[str, str, int]] | None = None  # None: wherever a reward is made for


def token_for(url: str, variable: str) -> str | None:
    """The token in an environment variable, for a reward at `url`; None where there is none or it may not go there.

    Warns where it is kept back.
    """
    token = os.environ.get(variable) or None
    if token is None or _allowed is None or _address(url) in _allowed:
        return token
    warnings.warn(
        f"{variable} is not sent to {url!r}, which a folder names that was not made here; if it may have it, give "
        f"--token-to {url}",
        stacklevel=3,
    )
    return None


@contextmanager
def tokens_only_to(addresses: Sequence[str] | None) -> Iterator[None]:
    """Within this context rewards are made with tokens for these addresses only; None is for all.

    Args:
        addresses: URLs, of which scheme, host and port count.

    Raises:
        ValueError: one is no http:// or https:// address.
    """
    global _allowed
    before, _allowed = _allowed, None if addresses is None else frozenset(_checked(url) for url in addresses)
    try:
        yield
    finally:
        _allowed = before


def _checked(url: str) -> tuple[str, str, int]:
    address = _address(url)
    if address is None:
        raise ValueError(f"token_to={url!r} must be an address such as http://host:8000")
    return address


def _address(url: str) -> tuple[str, str, int] | None:
    try:
        parts = urlsplit(url)
        port = parts.port or _DEFAULT_PORTS[parts.scheme]
    except (ValueError, KeyError):
        return None
    return (parts.scheme, parts.hostname, port) if parts.hostname else None
