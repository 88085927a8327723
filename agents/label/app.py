"""The page and its four answers, for this machine alone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import Field

from diffusion_gym.agents.label.questions import NoQuestion, Questions
from diffusion_gym.rewards.preference.labels import Choice, Person
from diffusion_gym.schemas import Positive, Schema, checked, parse_checked

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

_MOST_BYTES: Final = 2**12  # of a request
_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
_KINDS: Final = {"page.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
_OWN: Final = ("127.0.0.1", "localhost", "[::1]")


class _Asked(Schema):
    """The body of a POST: who, which answer, and, unless it is taken back, what it is."""

    person: Person
    number: Positive
    answer: Choice | None = None


class _Name(Schema):
    person: Person


class _Refused(Exception):
    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def make_app(questions: Questions, goal: Annotated[int, Field(ge=1)]) -> Starlette:
    """An ASGI application with the page; answers go to the folder of `questions`.

    - `GET /`, `/page.css`, `/page.js`, `/pictures/NAME`.
    - `GET /question?person=NAME`: the question to this person, and how far they are.
    - `POST /answer`, `POST /undo`: likewise, once the answer is on the disk. Status 409 where another one is expected.

    Args:
        questions: which pictures, and where answers go.
        goal: how many answers each person is asked for.
    """
    from starlette.applications import Starlette
    from starlette.routing import Route

    page = _Page(questions, goal)
    return Starlette(
        routes=[
            *(Route("/" if name == "page.html" else f"/{name}", _guarded(page.static(name))) for name in _KINDS),
            Route("/pictures/{name}", _guarded(page.picture)),
            Route("/question", _guarded(page.question)),
            Route("/answer", _guarded(page.answer), methods=["POST"]),
            Route("/undo", _guarded(page.undo), methods=["POST"]),
        ]
    )


class _Page:
    def __init__(self, questions: Questions, goal: int) -> None:
        self._questions, self._goal = questions, goal
        self._turn = asyncio.Lock()  # one answer at a time: the disk is waited for

    def static(self, name: str) -> Callable[[Request], Awaitable[Response]]:
        """One of the page's own files."""
        from starlette.responses import Response

        text = files("diffusion_gym.agents.label").joinpath("page", name).read_bytes()

        async def respond(request: Request) -> Response:
            return Response(text, media_type=_KINDS[name])

        return respond

    async def picture(self, request: Request) -> Response:
        """A picture of the labels; none else in the folder, or outside."""
        from starlette.responses import FileResponse

        name = request.path_params["name"]
        path = self._questions.labels.path(name)
        if name not in self._questions.labels.pictures or not path.is_file():
            raise _Refused(404, f"the file of the picture {name!r} is missing")
        return FileResponse(path, media_type="image/png")

    async def question(self, request: Request) -> Response:
        """The question to a person."""
        try:
            person = checked(_Name, dict(request.query_params), "the name", "give 1 to 40 characters").person
        except ValueError as error:
            raise _Refused(422, str(error)) from None
        async with self._turn:
            return await self._state(person, 200)

    async def answer(self, request: Request) -> Response:
        """Store an answer."""
        asked = await _body(request)
        if asked.answer is None:
            raise _Refused(422, "the field 'answer' is missing")
        return await self._stored(asked, self._questions.answer, asked.answer)

    async def undo(self, request: Request) -> Response:
        """Take an answer back."""
        return await self._stored(await _body(request), self._questions.undo)

    async def _stored(self, asked: _Asked, act: Callable[..., bool], *more: Any) -> Response:
        from starlette.concurrency import run_in_threadpool

        async with self._turn:
            try:
                counts = await run_in_threadpool(act, asked.person, asked.number, *more)
            except OSError as error:
                told = f"the answer is not stored ({error.strerror or error}); give it again once the disk takes it"
                raise _Refused(507, told) from None
            return await self._state(asked.person, 200 if counts else 409)

    async def _state(self, person: str, status: int) -> Response:
        """What the page shows next."""
        from starlette.concurrency import run_in_threadpool
        from starlette.responses import JSONResponse

        labels = self._questions.labels
        agreement = labels.agreement([person])
        told: dict[str, Any] = {
            "answered": len(labels.answers.get(person, [])),
            "goal": self._goal,
            "repeated": agreement.repeated,
            "same": agreement.same,
        }
        try:
            asked = await run_in_threadpool(self._questions.question, person)
            told["question"] = {name: getattr(asked, name) for name in ("number", "first", "second", "prompt")}
        except NoQuestion as error:
            told |= {"question": None, "why": str(error)}
        return JSONResponse(told, status)


def _guarded(respond: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """Answer this machine's own pages alone.

    A foreign `Host` is that of a page elsewhere whose name was made to lead here. `Origin` and `Sec-Fetch-Site` tell
    who sends a request, and a form of another page cannot have this content type.
    """
    from starlette.responses import JSONResponse

    async def checked_response(request: Request) -> Response:
        try:
            _check_sender(request)
            response = await respond(request)
        except _Refused as error:
            response = JSONResponse({"detail": str(error)}, error.status)
        response.headers.update(_HEADERS)
        return response

    return checked_response


def _check_sender(request: Request) -> None:
    host = request.headers.get("host", "")
    name, _, port = host.rpartition(":") if not host.endswith("]") else (host, "", "")
    if (name if port.isdigit() else host) not in _OWN:
        raise _Refused(403, f"the page is at http://127.0.0.1 alone, and not at {host!r}")
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site", "same-origin")
    if request.method != "POST":
        return
    if (origin is not None and origin != f"http://{host}") or site not in ("same-origin", "none"):
        raise _Refused(403, "answers come from the page itself alone")
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise _Refused(415, "the request has another Content-Type than application/json")


async def _body(request: Request) -> _Asked:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > _MOST_BYTES:
            raise _Refused(413, f"the request has more than {_MOST_BYTES} bytes")
    try:
        return parse_checked(_Asked, bytes(body), "the request", "load the page again")
    except ValueError as error:
        raise _Refused(422, str(error)) from None
