"""One JSON request over HTTP, and when it is worth another try."""

from __future__ import annotations

import email.utils
import functools
import math
import ssl
import time
from collections.abc import Mapping
from typing import Any, Final

from diffusion_gym.storage import json_text, parse_json

_MOST_BYTES: Final = 2**24  # an answer is a few kB; this bounds what a stray server can make us read
_TRY_AGAIN: Final = frozenset({408, 409, 425, 429})
# A proxy of the environment has no way to this machine.
_DIRECT: Final = {f"all://{host}": None for host in ("localhost", "127.0.0.1", "[::1]")}


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


def request_json(
    url: str, body: Mapping[str, Any] | None = None, *, key: str | None = None, timeout: float = 60.0
) -> Any:
    """GET `url`, or POST `body` to it, and read the JSON that comes back.

    Redirects are not followed: they would carry the key to another host. Nothing is kept from one request to the next.

    Args:
        url: where to.
        body: what to send as JSON; None for a GET.
        key: sent as a bearer token; None for none.
        timeout: seconds without a byte from the server, for the connection and then for the answer.

    Raises:
        RequestFailed: no connection, no answer in time, a status other than 2xx, or an answer that is not JSON.
    """
    import httpx2

    method, content, headers = "GET", None, {"Accept": "application/json", "Accept-Encoding": "identity"}
    if body is not None:
        method, content, headers["Content-Type"] = "POST", json_text(body).encode(), "application/json"
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    try:
        with (
            httpx2.Client(verify=_certificates(), mounts=_DIRECT, timeout=timeout) as client,
            client.stream(method, url, content=content, headers=headers) as answer,
        ):
            text = bytearray()
            for part in answer.iter_bytes():
                text += part
                if len(text) > _MOST_BYTES:
                    raise RequestFailed(f"the answer is longer than {_MOST_BYTES} bytes")
    except httpx2.TimeoutException as error:
        what = "connection" if isinstance(error, httpx2.ConnectTimeout) else "answer"
        raise RequestFailed(f"no {what} within timeout={timeout:g} s") from None
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise RequestFailed(f"{type(error).__name__}: {error}") from None
    if not answer.is_success:
        reason = f"HTTP {answer.status_code} {answer.reason_phrase}: {_message(text)}"
        raise RequestFailed(reason, answer.status_code, _seconds(answer.headers.get("Retry-After")))
    try:
        return parse_json(text)
    except ValueError as error:
        raise RequestFailed(f"the answer is not JSON ({error})") from None


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Those that a server's are checked against; reading them takes longer than a request."""
    import httpx2

    return httpx2.create_ssl_context()


def _message(text: bytearray) -> str:
    """What the server says of its error: OpenAI's and FastAPI's fields, else the beginning of the text."""
    try:
        found = parse_json(text)
        found = found.get("error") or found.get("detail") or found.get("message") or found
        found = found.get("message", found) if isinstance(found, dict) else found
    except (ValueError, AttributeError):
        found = text.decode("utf-8", errors="replace")
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
