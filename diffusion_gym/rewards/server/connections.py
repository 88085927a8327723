"""Connections that cannot be held for ever: uvicorn's, with a bound on their number and on the time that they wait."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    from starlette.applications import Starlette


def run(app: Starlette, listening: socket.socket, most: int, seconds: float, **options: Any) -> None:
    """Serve an application on a socket until Ctrl-C or SIGTERM, and close the socket.

    Args:
        app: the application.
        listening: the socket.
        most: connections; see `bounded`.
        seconds: that a client has; see `bounded`.
        **options: further ones of `uvicorn.Config`.
    """
    quiet: dict[str, Any] = {"ws": "none", "log_level": "warning", "access_log": False}
    config = uvicorn.Config(app, http=bounded(most, seconds), **quiet, **options)
    try:
        uvicorn.Server(config).run(sockets=[listening])
    except KeyboardInterrupt:  # uvicorn has let the running requests end by then
        pass
    finally:
        listening.close()


def bounded(most: int, seconds: float) -> type[H11Protocol]:
    """Uvicorn's connection, of which there are at most `most`.

    Uvicorn's own `limit_concurrency` answers 503 once a request has its headers, and counts connections without one:
    idle strangers would turn everybody away. Its `timeout_keep_alive` begins with the first answer. So here:

    - A client has `seconds` from the connection, or from the end of an answer, to the end of its next headers, and as
      long to read what waits to be sent.
    - Where there are `most` connections, a new one takes the place of the one that has kept the server waiting longest.
      One whose request has arrived is not closed; if that is all of them, the new one is.
    """

    class Connection(H11Protocol):
        since = 0.0  # when the server began to wait for this client
        _timer: asyncio.TimerHandle | None = None

        @property
        def waits(self) -> bool:
            """Whether it is the client's turn to send."""
            return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._begin_to_wait()
            if len(self.connections) > most:
                all_of_them: set[Any] = self.connections
                others = [other for other in all_of_them if other is not self and other.waits]
                closed = min(others, key=lambda other: other.since, default=self)
                self.connections.discard(closed)  # itself it does so later: the next one to come would count it
                closed.transport.abort()

        def on_response_complete(self) -> None:
            self._begin_to_wait()
            super().on_response_complete()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._begin_to_wait()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._stop_timer()

        def _begin_to_wait(self) -> None:
            self._stop_timer()
            self.since = self.loop.time()
            self._timer = self.loop.call_later(seconds, self._too_late)

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()

        def _too_late(self) -> None:
            in_turn = self.cycle is not None and not self.cycle.response_complete  # bodies have a time limit of theirs
            if not in_turn or self.flow.write_paused:
                self.transport.abort()

    return Connection
