"""The reward server: one reward, one thread that owns it, and HTTP in front. docs/reward-server.md."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import socket
import traceback
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from diffusion_gym._version import VERSION
from diffusion_gym.images import to_float
from diffusion_gym.rewards.base import Reward, reward_name
from diffusion_gym.rewards.server.wire import TOKEN, BadRequest, read_request, write_output
from diffusion_gym.rewards.worker import RewardWorker

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request

_BODY_SECONDS: Final = 120.0  # a client that sends nothing more would hold its place in the queue for ever
_NO_SERVER: Final = "the reward server needs starlette and uvicorn; pip install 'diffusion-denoise-gym[serve]'"


@dataclass(frozen=True)
class Limits:
    """What a reward server takes."""

    max_batch: int = 64
    """Pictures in one request, and scored at once: waiting requests are merged up to it."""
    max_queue: int = 16
    """Requests held at a time, the one being scored included; a client beyond it is asked to wait (HTTP 503)."""
    max_bytes: int = 2**26
    """Bytes of one request."""

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_queue", "max_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be at least 1")


class _Refusal(Exception):
    """An answer other than scores."""

    def __init__(self, status: int, reason: str, **headers: str) -> None:
        super().__init__(reason)
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}


class _Service:
    """The two endpoints."""

    def __init__(self, reward: Reward, token: str | None, limits: Limits) -> None:
        self.name, self.limits = reward_name(reward), limits
        self._reward = reward
        self._token = None if token is None else token.encode()
        self._held = 0

    @asynccontextmanager
    async def running(self, app: Any) -> AsyncIterator[None]:
        """The reward's thread lives as long as the server."""
        self.worker = RewardWorker(self._reward, self.limits.max_batch)
        try:
            yield
        finally:
            self.worker.close()

    async def health(self, request: Request) -> dict[str, Any]:
        """Open to all, so that a load balancer can ask; `authorized` says whether this client could score."""
        return {
            "name": self.name,
            "version": VERSION,
            "ready": self.worker.alive,
            "authorized": self._authorized(request),
            "held": self._held,
            "waiting": self.worker.waiting,
            **vars(self.limits),
        }

    async def score(self, request: Request) -> dict[str, Any]:
        """Scores of a batch."""
        from starlette.concurrency import run_in_threadpool

        if not self._authorized(request):
            raise _Refusal(401, f"the token is missing or wrong; set {TOKEN}", WWW_Authenticate="Bearer")
        with self._held_request():
            body = await self._body(request)
            try:
                asked = await run_in_threadpool(read_request, body, self.limits.max_batch)
            except BadRequest as error:
                raise _Refusal(422, str(error)) from None
            except (ValueError, RecursionError) as error:
                raise _Refusal(400, f"the body is not JSON ({error})") from None
            del body
            future = self.worker.submit(to_float(asked.pictures), asked.prompts, asked.metadata)
            try:
                output = await asyncio.wrap_future(future)
            except Exception as error:
                traceback.print_exception(error)  # the client is told one line; who wrote the reward wants to see where
                raise _Refusal(500, str(error)) from error
        return {"name": self.name, **write_output(output)}

    def _authorized(self, request: Request) -> bool:
        if self._token is None:
            return True
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        return kind.lower() == "bearer" and hmac.compare_digest(given.encode(), self._token)

    @contextmanager
    def _held_request(self) -> Iterator[None]:
        """A place in the queue, taken before the body is read: that bounds the memory."""
        if self._held >= self.limits.max_queue:
            raise _Refusal(503, f"max_queue={self.limits.max_queue} requests are held already", Retry_After="1")
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1

    async def _body(self, request: Request) -> bytes:
        most = self.limits.max_bytes
        too_large = _Refusal(413, f"the request exceeds max_bytes={most}; send fewer pictures at once")
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > most:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for part in request.stream():
                    body += part
                    if len(body) > most:
                        raise too_large
        except TimeoutError:
            raise _Refusal(408, f"the request did not arrive within {_BODY_SECONDS:g} s") from None
        return bytes(body)


def make_app(reward: Reward, *, token: str | None = None, limits: Limits | None = None) -> Starlette:
    """An ASGI application that serves `reward`.

    Args:
        reward: the reward; one thread calls it.
        token: what clients must send as a bearer token; None lets everyone in who reaches the port.
        limits: what is taken.
    """
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    service = _Service(reward, token, limits or Limits())

    def endpoint(answer: Any) -> Any:
        async def respond(request: Request) -> Response:
            try:
                return JSONResponse(await answer(request))
            except _Refusal as error:
                return JSONResponse({"detail": str(error)}, error.status, error.headers)
            except ClientDisconnect:
                return Response(status_code=499)

        return respond

    return Starlette(
        routes=[
            Route("/health", endpoint(service.health), methods=["GET"]),
            Route("/score", endpoint(service.score), methods=["POST"]),
        ],
        lifespan=service.running,
    )


def serve(reward: Reward, *, host: str, port: int, token: str | None = None, limits: Limits | None = None) -> None:
    """Serve `reward` until Ctrl-C or SIGTERM; port 0 takes a free one. Prints the address once it can be used.

    Raises:
        ValueError: a host that other machines reach without a token, or the `serve` extra is not installed.
        OSError: the address cannot be had.
    """
    try:
        import uvicorn

        app = make_app(reward, token=token, limits=limits)
    except ImportError as error:
        raise ValueError(f"{_NO_SERVER} ({error})") from error
    if token is None and not _own_machine(host):
        raise ValueError(f"host={host!r} lets other machines in; give a token with --token or {TOKEN}")
    listening = _listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    print(f"{reward_name(reward)} at http://{shown}:{listening.getsockname()[1]}; Ctrl-C ends it", flush=True)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=10, lifespan="on")
    try:
        uvicorn.Server(config).run(sockets=[listening])
    except KeyboardInterrupt:  # uvicorn has let the running requests end by then
        pass
    finally:
        listening.close()


def _own_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, OverflowError) as error:
        raise OSError(f"host={host!r} with port={port} cannot be served ({error}); choose another --port") from error
