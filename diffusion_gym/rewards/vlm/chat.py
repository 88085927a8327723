"""A vision-language model behind an OpenAI-compatible server: vLLM, SGLang, `transformers serve` and others."""

from __future__ import annotations

import base64
import io
import random
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import numpy as np
import torch
from numpy.typing import NDArray

from diffusion_gym.rewards.http import RequestFailed, request_json
from diffusion_gym.rewards.server.wire import check_token
from diffusion_gym.rewards.tokens import token_for
from diffusion_gym.rewards.vlm.base import VLMError

if TYPE_CHECKING:
    from tenacity import RetryCallState

API_KEY: Final = "DIFFUSION_GYM_VLM_API_KEY"
_LONGEST_WAIT: Final = 600.0  # seconds; a server that asks for more is given up
_LONGEST_BACKOFF: Final = 30.0  # seconds
_REFUSED: Final = frozenset({401, 403, 404, 405})  # no picture will fare better


class ChatVLM:
    """Asks a chat-completions server one question a picture, several at a time, at temperature 0.

    Args:
        url: the base URL, such as `http://127.0.0.1:8000/v1`.
        vlm_model: the model's name at the server; by default the first that it lists.
        api_key: sent as a bearer token; by default the environment variable `DIFFUSION_GYM_VLM_API_KEY`, if set.
        concurrency: requests under way at once.
        timeout: seconds to wait for an answer.
        retries: further tries after a lost connection, a time-out, HTTP 429 or 5xx.
        max_tokens: the longest answer, in tokens.
        image_format: `png`, which is exact, or `jpeg` (quality 95), which is smaller.
        backoff: seconds before the first further try; doubled each time, up to 30, with jitter. A server's
            `Retry-After` is kept to.

    Raises:
        ValueError: an option that is out of range.
        VLMError: the server cannot be reached, or refuses the key or the model.
    """

    remote = True

    def __init__(
        self,
        url: str,
        *,
        vlm_model: str | None = None,
        api_key: str | None = None,
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 5,
        max_tokens: int = 64,
        image_format: str = "png",
        backoff: float = 0.5,
    ) -> None:
        if concurrency < 1 or max_tokens < 1:
            raise ValueError(f"concurrency={concurrency!r} and max_tokens={max_tokens!r} must be at least 1")
        if timeout <= 0 or retries < 0 or backoff < 0:
            raise ValueError(
                f"timeout={timeout!r} must be above 0, retries={retries!r} and backoff={backoff!r} at least 0"
            )
        if image_format not in ("png", "jpeg"):
            raise ValueError(f"image_format={image_format!r} must be png or jpeg")
        self.url = url.rstrip("/") if urlsplit(url).path.strip("/") else url.rstrip("/") + "/v1"
        self._key = api_key or token_for(self.url, API_KEY)
        if self._key is not None:
            check_token(self._key, f"the key, api_key or {API_KEY},")
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self.max_tokens, self.image_format = max_tokens, image_format
        self.concurrency = concurrency
        self._slots = threading.BoundedSemaphore(concurrency)
        self._under_way: set[_Batch] = set()
        self.model = vlm_model or self._first_model()
        self.name = f"{self.model} ({image_format}, {max_tokens} tokens)"

    def describe(self, pictures: torch.Tensor, questions: Sequence[str]) -> list[str | None]:
        """Answer one question a picture; see `VLM.describe`. Warns where some got no answer."""
        batch = _Batch(list(zip(pictures.cpu().numpy(), questions, strict=True)))
        self._under_way.add(batch)
        try:
            answers = batch.run(self._answer, self.concurrency)
        except BaseException:
            self._slots = threading.BoundedSemaphore(self.concurrency)  # requests that hang keep the old ones
            raise
        finally:
            self._under_way.discard(batch)
        failed = [answer for answer in answers if isinstance(answer, RequestFailed)]
        if failed and len(failed) == len(answers):
            raise VLMError(f"vlm={self.url!r} described none of {len(answers)} pictures; the last error: {failed[-1]}")
        if failed:
            warnings.warn(
                f"vlm={self.url!r} did not describe {len(failed)} of {len(answers)} pictures, which score NaN; "
                f"the last error: {failed[-1]}",
                stacklevel=2,
            )
        return [None if isinstance(answer, RequestFailed) else answer for answer in answers]

    def cancel(self) -> None:
        """Have every `describe` under way in other threads raise VLMError now."""
        for batch in list(self._under_way):
            batch.cancel(VLMError(f"vlm={self.url!r}: cancelled"))

    def _answer(self, picture: NDArray[np.uint8], question: str, stop: threading.Event) -> str | RequestFailed:
        """The answer, or why there is none after all tries.

        Raises:
            VLMError: the server refuses the key or the model.
        """
        from tenacity import Retrying, retry_if_exception, sleep_using_event, stop_after_attempt, stop_when_event_set

        tries = Retrying(
            retry=retry_if_exception(_passes),
            wait=self._pause,
            stop=stop_after_attempt(self.retries + 1) | stop_when_event_set(stop),
            sleep=sleep_using_event(stop),
            reraise=True,
        )
        try:
            return tries(self._complete, self._body(picture, question))
        except RequestFailed as error:
            if error.status in _REFUSED:
                raise VLMError(self._refusal(error)) from None
            return error

    def _complete(self, body: Mapping[str, Any]) -> str:
        with self._slots:  # not while it waits for its next try
            return _content(request_json(f"{self.url}/chat/completions", body, key=self._key, timeout=self.timeout))

    def _pause(self, state: RetryCallState) -> float:
        """Seconds before the next try."""
        from tenacity import wait_exponential

        asked = getattr(state.outcome and state.outcome.exception(), "retry_after", None)
        backoff = wait_exponential(multiplier=self.backoff, max=_LONGEST_BACKOFF)(state)
        return max(backoff * random.uniform(0.5, 1.0), asked or 0.0)

    def _body(self, picture: NDArray[np.uint8], question: str) -> dict[str, Any]:
        shown = picture if picture.ndim == 4 else picture[None]
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": data_url(one, self.image_format)}} for one in shown
        ]
        content.append({"type": "text", "text": question})
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }

    def _first_model(self) -> str:
        try:
            listed = request_json(f"{self.url}/models", key=self._key, timeout=min(self.timeout, 10.0))
        except RequestFailed as error:
            if error.status in _REFUSED:
                raise VLMError(self._refusal(error)) from None
            raise VLMError(
                f"vlm={self.url!r} does not answer ({error}); start a server there, such as "
                f"`vllm serve llava-hf/llava-1.5-7b-hf`, or pass another URL"
            ) from None
        try:
            return str(listed["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise VLMError(f"vlm={self.url!r} lists no model at /models; name it with vlm_model='NAME'") from None

    def _refusal(self, error: RequestFailed) -> str:
        if error.status in (401, 403):
            had = "the API key was refused" if self._key else f"it wants an API key; set {API_KEY} or pass api_key"
            return f"vlm={self.url!r}: {had} ({error})"
        model = getattr(self, "model", None)
        return (
            f"vlm={self.url!r} with vlm_model={model!r} was refused ({error}); the URL is the part before "
            f"/chat/completions, and vlm_model a name that {self.url}/models lists"
        )


class _Batch:
    """Questions that several threads answer; whoever waits for them hears at once of an error that ends them all."""

    def __init__(self, asked: list[tuple[NDArray[np.uint8], str]]) -> None:
        self.asked = asked
        self.stop = threading.Event()
        self._todo: SimpleQueue[int] = SimpleQueue()
        self._done: SimpleQueue[tuple[int, str | RequestFailed] | BaseException] = SimpleQueue()
        for index in range(len(asked)):
            self._todo.put(index)

    def run(self, answer: Callable[..., str | RequestFailed], threads: int) -> list[str | RequestFailed]:
        """The answers in their order.

        Raises:
            BaseException: the first that `answer` has raised, or that of `cancel`.
        """
        for _ in range(min(threads, len(self.asked))):
            # Daemons: a server that hangs must not keep the program from ending.
            threading.Thread(target=self._work, args=(answer,), name="vlm", daemon=True).start()
        answers: dict[int, str | RequestFailed] = {}
        try:
            while len(answers) < len(self.asked):
                found = self._done.get()
                if isinstance(found, BaseException):
                    raise found
                answers[found[0]] = found[1]
        finally:
            self.stop.set()
        return [answers[index] for index in range(len(self.asked))]

    def cancel(self, error: BaseException) -> None:
        self.stop.set()
        self._done.put(error)

    def _work(self, answer: Callable[..., str | RequestFailed]) -> None:
        while not self.stop.is_set():
            try:
                index = self._todo.get_nowait()
            except Empty:
                return
            try:
                self._done.put((index, answer(*self.asked[index], self.stop)))
            except BaseException as error:
                self._done.put(error)
                return


def data_url(picture: NDArray[np.uint8], image_format: str) -> str:
    """A picture, uint8 `(H, W, 3)`, as a base64 `data:` URL."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, image_format.upper(), quality=95)
    return f"data:image/{image_format};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _passes(error: BaseException) -> bool:
    return isinstance(error, RequestFailed) and error.passing and (error.retry_after or 0.0) <= _LONGEST_WAIT


def _content(answer: Any) -> str:
    """The text of a chat completion.

    Raises:
        RequestFailed: it is no chat completion.
    """
    try:
        text = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        text = None
    if not isinstance(text, str):
        raise RequestFailed(f"the answer is no chat completion: {str(answer)[:200]}")
    return text.strip()
