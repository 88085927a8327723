"""One JSON request over HTTP with the standard library, and when it is worth another try."""

from __future__ import annotations

import email.utils
import math
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any, Final

from diffusion_gym.storage import json_text, parse_json

_MOST_BYTES: Final = 2**24  # an answer is a few kB; this bounds what a stray server can make us read
_TRY_AGAIN: Final = frozenset({408, 409, 425, 429})


class RequestFailed(Exception):
    """A request without a usable answer.

    Attributes:
        status: the HTTP status; None where there was none.
        retry_after: seconds that the server asks us to wait; None where it says nothing.
    """

    def __init__(self, reason: str, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.status, self.retry_after = status, retry_after

    @property
    def passing(self) -> bool:
        """Whether the same request may succeed later: no connection, a time-out, a busy or failing server."""
        return self.status is None or self.status in _TRY_AGAIN or self.status >= 500


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host, and turn a POST into a GET."""

    def redirect_request(self, *args: Any) -> None:
        return None


_OPENER: Final = urllib.request.build_opener(_NoRedirects)


def request_json(
    url: str, body: Mapping[str, Any] | None = None, *, key: str | None = None, timeout: float = 60.0
) -> Any:
    """GET `url`, or POST `body` to it, and read the JSON that comes back.

    Args:
        url: where to.
        body: what to send as JSON; None for a GET.
        key: sent as a bearer token; None for none.
        timeout: seconds without a byte from the server, for the connection and then for the answer.

    Raises:
        RequestFailed: no connection, no answer in time, a status other than 2xx, or an answer that is not JSON.
    """
    headers = {"Accept": "application/json"}
    if body is not None:
        headers["Content-Type"] = "application/json"
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json_text(body).encode()
    try:
        with _OPENER.open(urllib.request.Request(url, data=data, headers=headers), timeout=timeout) as answer:
            return parse_json(answer.read(_MOST_BYTES))
    except urllib.error.HTTPError as error:
        raise RequestFailed(
            f"HTTP {error.code} {error.reason}: {_message(error)}",
            error.code,
            _seconds(error.headers.get("Retry-After")),
        ) from None
    except TimeoutError:
        raise RequestFailed(f"no answer within timeout={timeout:g} s") from None
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise RequestFailed(f"no connection within timeout={timeout:g} s") from None
        raise RequestFailed(f"{type(reason).__name__}: {reason}") from None
    except ValueError as error:
        raise RequestFailed(f"the answer is not JSON ({error})") from None


def _message(error: urllib.error.HTTPError) -> str:
    """What the server says of its error: OpenAI's and FastAPI's fields, else the beginning of the text."""
    try:
        text = error.read(_MOST_BYTES).decode("utf-8", errors="replace")
    except (OSError, HTTPException):
        return ""
    try:
        found = parse_json(text)
        found = found.get("error") or found.get("detail") or found.get("message") or found
        found = found.get("message", found) if isinstance(found, dict) else found
    except (ValueError, AttributeError):
        found = text
    return " ".join(str(found).split())[:300]


def _seconds(retry_after: str | None) -> float | None:
    """Seconds of a `Retry-After` header, which holds a number or a date; None where it holds neither."""
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
