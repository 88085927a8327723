"""A reward that another process computes: the client of the reward server. docs/reward-server.md."""

from __future__ import annotations

import json
import math
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import torch

from diffusion_gym.rewards.base import REWARDS, RewardError, RewardOutput
from diffusion_gym.rewards.http import RequestFailed, request_json
from diffusion_gym.rewards.server.wire import TOKEN, Answer, Health, check_token, encode_images
from diffusion_gym.rewards.tokens import token_for
from diffusion_gym.schemas import checked

_S = TypeVar("_S", Answer, Health)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 10.0  # seconds between two tries
_REWARD_RAISED: Final = 500  # the server answers, and would raise again


class RemoteReward:
    """Scores pictures at a reward server; while that is away or busy it waits, and no sample is lost.

    Args:
        url: the server, such as `http://127.0.0.1:8000`.
        token: sent as a bearer token; by default the environment variable `DIFFUSION_GYM_REWARD_TOKEN`, if set.
        timeout: seconds to wait for the answer to one request.
        patience: seconds to go on trying without an answer before the reward fails, which stops a run with its
            checkpoint kept.

    Attributes:
        name: the reward's name, as the server says.
        default_prompts: the prompt set of the reward of that name, where there is one here.
        needs_metadata: the keys that the server's reward needs of every prompt.

    Raises:
        ValueError: an argument out of range.
        RewardError: no reward server answers there, or it refuses the token.
    """

    background = True

    def __init__(self, url: str, *, token: str | None = None, timeout: float = 300.0, patience: float = 600.0) -> None:
        address = urlsplit(url)
        if address.scheme not in ("http", "https") or not address.hostname or address.username is not None:
            raise ValueError(f"reward={url!r} must be http://host:port or https://host:port, and {TOKEN} hold a token")
        if timeout <= 0 or patience < 0:
            raise ValueError(f"timeout={timeout!r} must be larger than 0 and patience={patience!r} at least 0")
        self.url, self.timeout, self.patience = url.rstrip("/"), timeout, patience
        self._token = token if token is not None else token_for(self.url, TOKEN)
        if self._token is not None:
            check_token(self._token, f"the token, an argument or {TOKEN},")
        self._cancelled = threading.Event()
        health = self._health()
        self.name, self.max_batch, self.max_bytes = health.name, health.max_batch, health.max_bytes
        self.max_unpacked = math.inf if health.max_unpacked is None else health.max_unpacked
        self.needs_metadata = tuple(health.needs_metadata)
        self.default_prompts = REWARDS.default_prompts(self.name) if self.name in REWARDS else None

    def __call__(
        self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> RewardOutput:
        """Score `images`, float `(N, 3, H, W)` in [0, 1], which the server sees rounded to 8 bits.

        Raises:
            RewardError: the reward raised at the server, the server refused the request, or it was away for longer
                than `patience`.
        """
        self._cancelled.clear()
        outputs = [
            self._score(body, number, images.device) for body, number in self._requests(images, prompts, metadata)
        ]
        names = [name for name in outputs[0].info if all(name in output.info for output in outputs)]
        return RewardOutput(
            torch.cat([output.scores for output in outputs]),
            {name: torch.cat([output.info[name] for output in outputs]) for name in names},
        )

    def cancel(self) -> None:
        """Have a call that waits for the server give up; an answer under way is waited for."""
        self._cancelled.set()

    def _health(self) -> Health:
        try:
            told = request_json(f"{self.url}/health", key=self._token, timeout=min(self.timeout, 10.0))
        except RequestFailed as error:
            raise RewardError(
                f"reward={self.url!r} does not answer ({error}); start it there with "
                f"`diffusion-gym serve-reward NAME --port {urlsplit(self.url).port or 80}`"
            ) from None
        health = self._read(Health, told, f"{self.url}/health", "give the URL of a `diffusion-gym serve-reward`")
        if not health.authorized:
            raise RewardError(self._refused_token())
        return health

    def _requests(
        self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> Iterator[tuple[dict[str, Any], int]]:
        """Bodies within the server's limits, and how many pictures each holds."""
        rows: list[tuple[str, str, Mapping[str, Any]]] = []
        size, unpacked = 0, images[0].numel()
        if unpacked > self.max_unpacked:
            raise RewardError(
                f"reward={self.url!r} takes max_unpacked={self.max_unpacked} bytes of pictures, a single one has "
                f"{unpacked}; start the server with a larger --max-memory"
            )
        most = min(self.max_batch, self.max_unpacked // unpacked)
        for row in zip(encode_images(images), prompts, metadata, strict=True):
            own = len(row[0]) + len(json.dumps(row[1:])) + 64  # the keys and commas around it
            if own > self.max_bytes:
                raise RewardError(
                    f"reward={self.url!r} takes requests of max_bytes={self.max_bytes}, a single picture has {own}; "
                    "start the server with a larger --max-bytes"
                )
            if rows and (len(rows) == most or size + own > self.max_bytes):
                yield _body(rows), len(rows)
                rows, size = [], 0
            rows.append(row)
            size += own
        yield _body(rows), len(rows)

    def _score(self, body: Mapping[str, Any], number: int, device: torch.device) -> RewardOutput:
        answer = self._read(Answer, self._post(body), "the answer", "give the server this version of diffusion_gym")
        if answer.name not in (None, self.name):
            raise RewardError(f"reward={self.url!r} serves {answer.name!r} now, and {self.name!r} when the run began")
        try:
            return answer.output(number, device)
        except ValueError as error:
            raise RewardError(f"reward={self.url!r}: {error}") from None

    def _read(self, schema: type[_S], value: Any, where: str, remedy: str) -> _S:
        try:
            return checked(schema, value, where, remedy)
        except ValueError as error:
            raise RewardError(f"reward={self.url!r} is no reward server: {error}") from None

    def _post(self, body: Mapping[str, Any]) -> Any:
        """Send until there is an answer, or patience is at an end."""
        pause, deadline = _FIRST_PAUSE, None
        while True:
            try:
                return request_json(f"{self.url}/score", body, key=self._token, timeout=self.timeout)
            except RequestFailed as error:
                now = time.monotonic()
                deadline = now + self.patience if deadline is None else deadline
                self._give_up_if_useless(error, deadline - now)
                wait = min(max(pause, error.retry_after or 0.0), deadline - now)
            if self._cancelled.wait(wait):
                raise RewardError(f"reward={self.url!r} was given up before it answered")
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _give_up_if_useless(self, error: RequestFailed, patience_left: float) -> None:
        if error.status == 401:
            raise RewardError(self._refused_token()) from None
        if error.status == _REWARD_RAISED or not error.passing:
            raise RewardError(f"reward={self.url!r} failed: {error}") from None
        if patience_left <= 0:
            raise RewardError(
                f"reward={self.url!r} has not answered for patience={self.patience:g} s ({error}); start it again, "
                "then go on from the checkpoint with --resume"
            ) from None
        if error.status != 503:  # that one is only busy
            warnings.warn(
                f"reward={self.url!r} does not answer ({error}); trying again for up to {self.patience:g} s",
                stacklevel=2,
            )

    def _refused_token(self) -> str:
        what = "the token was refused" if self._token else "it wants a token"
        return f"reward={self.url!r}: {what}; set {TOKEN} to the server's, or pass token"


def _body(rows: Sequence[tuple[str, str, Mapping[str, Any]]]) -> dict[str, Any]:
    images, prompts, metadata = zip(*rows, strict=True)
    return {"images": images, "prompts": prompts, "metadata": metadata}
