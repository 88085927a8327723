"""The reward server: one reward, one thread that owns it, and HTTP in front. docs/reward-server.md."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import re
import socket
import traceback
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, Final

from diffusion_gym._version import VERSION
from diffusion_gym.rewards.base import Reward, RewardOutput, needed_metadata, reward_name
from diffusion_gym.rewards.server.limits import FewLines, Limits, Memory, MemoryFull, Share
from diffusion_gym.rewards.server.wire import (
    TOKEN,
    BadRequest,
    ScoreRequest,
    check_token,
    read_request,
    write_output,
)
from diffusion_gym.rewards.worker import RewardWorker

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request

_SLOWEST: Final = 2**14  # bytes of a body in a second
_HEADER_BYTES: Final = 2**14
_NO_SERVER: Final = "the reward server needs starlette and uvicorn; pip install 'diffusion-denoise-gym[serve]'"
_LOG: Final = logging.getLogger(__name__)


class _Refusal(Exception):
    """An answer other than scores."""

    def __init__(self, status: int, reason: str, **headers: str) -> None:
        super().__init__(reason)
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}


def _busy(reason: str) -> _Refusal:
    """What passes: the client tries again, and its run goes on."""
    return _Refusal(503, reason, Retry_After="1")


class _Service:
    """The two endpoints."""

    def __init__(self, reward: Reward, token: str | None, limits: Limits) -> None:
        self.name, self.limits = reward_name(reward), limits
        self._reward = reward
        self._token = None if token is None else token.encode()
        self._held = 0
        self._memory = Memory(limits.max_memory)
        self._unpacking = asyncio.Lock()  # one body at a time, since its JSON takes up to five times its bytes

    @asynccontextmanager
    async def running(self, app: Any) -> AsyncIterator[None]:
        """The reward's thread lives as long as the server."""
        self.worker = RewardWorker(self._reward, self.limits.max_batch, self.limits.max_unpacked)
        try:
            yield
        finally:
            self.worker.close()

    async def health(self, request: Request) -> tuple[int, dict[str, Any]]:
        """Open to all, so that a load balancer can ask; `authorized` says whether this client could score."""
        why = self._why_not_ready()
        told = {
            "name": self.name,
            "version": VERSION,
            "ready": why is None,
            "authorized": self._authorized(request),
            "needs_metadata": needed_metadata(self._reward),
            "held": self._held,
            "waiting": self.worker.waiting,
            "memory": self._memory.held,
            "seconds": round(self.worker.seconds, 1),
            **vars(self.limits),
            "max_unpacked": self.limits.max_unpacked,
        }
        return (200, told) if why is None else (503, {**told, "detail": why})

    async def score(self, request: Request) -> tuple[int, dict[str, Any]]:
        """Scores of a batch."""
        if not self._authorized(request):
            raise _Refusal(401, f"the token is missing or wrong; set {TOKEN}", WWW_Authenticate="Bearer")
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise _Refusal(415, "the request has another Content-Type than application/json")  # a page's form has
        self._check_place()  # before the body is read, and after
        with Share(self._memory) as share:
            asked, pictures = await self._asked(request, share)
            with self._held_request():
                future = self.worker.submit(pictures, asked.prompts, asked.metadata)
                share.leave_to(future)
                del pictures
                output = await self._output(request, future)
        return 200, {"name": self.name, **write_output(output)}

    def _why_not_ready(self) -> str | None:
        """None where the server is ready."""
        return self.worker.late(self.limits.reward_seconds) if self.worker.alive else "the server is ending"

    def _authorized(self, request: Request) -> bool:
        if self._token is None:
            return True
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        return kind.lower() == "bearer" and hmac.compare_digest(given.encode(), self._token)

    def _check_place(self) -> None:
        if (why := self._why_not_ready()) is not None:
            raise _busy(why)
        if self._held >= self.limits.max_queue:
            raise _busy(f"max_queue={self.limits.max_queue} requests are held already")

    @contextmanager
    def _held_request(self) -> Iterator[None]:
        """A place in the queue; a slow body has none yet."""
        self._check_place()
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1

    async def _asked(self, request: Request, share: Share) -> tuple[ScoreRequest, Any]:
        """The request without its images, and its pictures; `share` holds their bytes."""
        from starlette.concurrency import run_in_threadpool

        body = await self._body(request, share)
        number, most = len(body), self.limits.max_unpacked
        async with self._unpacking:
            try:
                asked = await run_in_threadpool(read_request, body, self.limits.max_batch)
                if asked.unpacked_bytes > most:
                    raise _Refusal(
                        413, f"the pictures unpack to {asked.unpacked_bytes} bytes, max_unpacked={most}; send fewer"
                    )
                share.take(asked.unpacked_bytes)
                pictures = await run_in_threadpool(asked.unpack)
            except BadRequest as error:
                raise _Refusal(422, str(error)) from None
            except ValueError as error:
                raise _Refusal(400, f"the body is not JSON ({error})") from None
        text = 4 * (number - sum(map(len, asked.images)))  # Python holds up to 4 bytes a character
        asked.images.clear()
        body.clear()
        share.take(text - number)
        return asked, pictures

    async def _body(self, request: Request, share: Share) -> bytearray:
        most, seconds = self.limits.max_bytes, self.limits.client_seconds
        too_large = _Refusal(413, f"the request exceeds max_bytes={most}; send fewer pictures at once")
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length[:20]) > most:
            raise too_large
        body, begin = bytearray(), asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(seconds) as limit:
                async for part in request.stream():
                    if len(body) + len(part) > most:
                        raise too_large
                    share.take(len(part))
                    body += part
                    limit.reschedule(begin + seconds + len(body) / _SLOWEST)
        except TimeoutError:
            came = f"{len(body)} bytes of the request came within client_seconds={seconds:g} and 1 s for 16 KiB"
            raise _Refusal(408, came, Connection="close") from None
        return body

    async def _output(self, request: Request, future: Future[RewardOutput]) -> RewardOutput:
        """What the reward says, as long as the client waits for it."""
        from starlette.requests import ClientDisconnect

        async def left() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        answer, leaving = asyncio.wrap_future(future), asyncio.create_task(left())
        either: set[asyncio.Future[Any]] = {answer, leaving}
        try:
            while not answer.done():
                await asyncio.wait(either, timeout=0.5, return_when=asyncio.FIRST_COMPLETED)
                if leaving.done() and not answer.done():
                    raise ClientDisconnect
                late = self.worker.late(self.limits.reward_seconds)
                if late is not None and not answer.done():
                    _LOG.error("%s", late)
                    raise _busy(late)
            return answer.result()
        except (_Refusal, ClientDisconnect):
            raise
        except Exception as error:
            _LOG.error("the reward failed", exc_info=error)  # the client is told one line, which does not say where
            told = _without_paths(str(error))
            _let_go(error)
            raise _Refusal(500, told) from None
        finally:
            leaving.cancel()
            answer.cancel()
            self.worker.withdraw(future)


def _without_paths(text: str) -> str:
    """An error's text with files instead of their paths, not endless, and of what UTF-8 can hold."""
    text = text[:2000].encode(errors="replace").decode()
    text = re.sub(r"""(['"])(?:[A-Za-z]:)?[\\/](?:[^'"\n]*[\\/])?([^'"\\/\n]*)\1""", r"\1\2\1", text)
    return re.sub(r"""(?<![\w:/\\.])(?:[A-Za-z]:)?[\\/](?:[^\s'"\\/]+[\\/])+""", "", text)


def _let_go(error: BaseException | None) -> None:
    """Empty the frames that an error keeps: they hold the pictures."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


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

    if token is not None:
        check_token(token, "token")
    service = _Service(reward, token, limits or Limits())

    def endpoint(answer: Any) -> Any:
        async def respond(request: Request) -> Response:
            try:
                status, found = await answer(request)
                return JSONResponse(found, status)
            except ClientDisconnect:
                return Response(status_code=499)
            except _Refusal as error:
                refusal = error
            except MemoryFull as error:
                refusal = _busy(str(error))
            except asyncio.CancelledError:  # by the end of the worker or of uvicorn, which would answer 500
                return JSONResponse({"detail": "the server is ending"}, 503, {"Retry-After": "1"})
            except Exception as error:  # ours: not this client's fault, so its run does not end of it
                _LOG.error("%s %s failed", request.method, request.url.path, exc_info=error)
                _let_go(error)
                refusal = _busy(f"the server failed ({type(error).__name__}); its log says why")
            if refusal.status != 408 and "expect" not in request.headers:  # that one waits for a word before it sends
                await _drain(request, service.limits)
            return JSONResponse({"detail": str(refusal)}, refusal.status, refusal.headers)

        return respond

    return Starlette(
        routes=[
            Route("/health", endpoint(service.health), methods=["GET"]),
            Route("/score", endpoint(service.score), methods=["POST"]),
        ],
        lifespan=service.running,
    )


async def _drain(request: Request, limits: Limits) -> None:
    """Let a client that was refused finish: one that still sends would see a broken connection, and not the answer."""
    from starlette.requests import ClientDisconnect

    left = limits.max_bytes
    try:
        async with asyncio.timeout(limits.client_seconds):
            async for part in request.stream():
                left -= len(part)
                if left < 0:
                    return
    except (TimeoutError, ClientDisconnect, RuntimeError):  # RuntimeError: the body has been read
        pass


def check_address(host: str, port: int, token: str | None) -> None:
    """Refuse an address that cannot or should not be served, before a reward is built for it.

    Raises:
        ValueError: a port out of range, an empty token, or a host that other machines reach without a token.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"port={port} must be 1 to 65535, or 0 for a free one")
    if token is not None:
        check_token(token, f"the token, from --token or {TOKEN},")
    elif not _own_machine(host):
        raise ValueError(f"host={host!r} lets other machines in; give a token with --token or {TOKEN}")


def serve(reward: Reward, *, host: str, port: int, token: str | None = None, limits: Limits | None = None) -> None:
    """Serve `reward` until Ctrl-C or SIGTERM; port 0 takes a free one. Prints the address once it can be used.

    Raises:
        ValueError: what `check_address` refuses, or the `serve` extra is not installed.
        OSError: the address cannot be had.
    """
    check_address(host, port, token)
    limits = limits or Limits()
    try:
        from diffusion_gym.rewards.server.connections import run

        app = make_app(reward, token=token, limits=limits)
    except ImportError as error:
        raise ValueError(f"{_NO_SERVER} ({error})") from error
    listening = listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    print(f"{reward_name(reward)} at http://{shown}:{listening.getsockname()[1]}; Ctrl-C ends it", flush=True)
    for name in (__name__, "uvicorn.error", "asyncio"):
        logging.getLogger(name).addFilter(FewLines())
    run(
        app,
        listening,
        limits.max_connections,
        limits.client_seconds,
        lifespan="on",
        backlog=limits.max_connections,  # so many more descriptors are open for a moment, until it counts them
        h11_max_incomplete_event_size=_HEADER_BYTES,
        timeout_graceful_shutdown=10,
    )


def _own_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at an address; port 0 takes a free one.

    Raises:
        OSError: the address cannot be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, OverflowError) as error:
        raise OSError(f"host={host!r} with port={port} cannot be served ({error}); choose another --port") from error
