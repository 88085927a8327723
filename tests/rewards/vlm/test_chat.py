"""The client of chat-completions servers, against a server on a real socket."""

import base64
import io
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_gym.agents.cli import main
from diffusion_gym.rewards.vlm import ChatVLM, VLMError, make_vlm
from diffusion_gym.rewards.vlm.chat import API_KEY

SECRET = "sk-do-not-tell"
QUESTION = "what is happening in this image?"


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv(API_KEY, raising=False)


def ask(server_or_url, pictures, **options):
    url = getattr(server_or_url, "url", server_or_url)
    vlm = ChatVLM(url, **{"vlm_model": "llava", "backoff": 0.001, **options})
    return vlm.describe(pictures, [QUESTION] * len(pictures))


def picture_in(body):
    """The pixels that a request carries."""
    [turn] = body["messages"]
    [url] = [part["image_url"]["url"] for part in turn["content"] if part["type"] == "image_url"]
    head, data = url.split(",", 1)
    return head, np.asarray(Image.open(io.BytesIO(base64.b64decode(data, validate=True))))


# --- what is sent ---


def test_request_is_a_chat_completion_with_the_exact_picture(server, pictures):
    assert ask(server, pictures[:1], max_tokens=17) == ["a cat"]
    [request] = server.requests
    assert request["path"] == "/v1/chat/completions"
    assert "Authorization" not in request["headers"]
    body = request["body"]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("llava", 0, 17)
    assert [turn["role"] for turn in body["messages"]] == ["user"]
    assert [part["text"] for part in body["messages"][0]["content"] if part["type"] == "text"] == [QUESTION]
    head, pixels = picture_in(body)
    assert head == "data:image/png;base64" and np.array_equal(pixels, pictures[0].numpy())


def test_jpeg_is_close_to_a_smooth_picture(server):
    ramp = torch.arange(32, dtype=torch.uint8)[:, None, None].expand(1, 32, 32, 3).contiguous() * 7
    ask(server, ramp, image_format="jpeg")
    head, pixels = picture_in(server.requests[0]["body"])
    assert head == "data:image/jpeg;base64"
    assert np.abs(pixels.astype(int) - ramp[0].numpy().astype(int)).max() < 12


def test_answers_come_in_the_order_of_the_pictures(server, pictures):
    def reply(number, body):
        time.sleep(0.01 * (6 - number))  # the first to come is the last to leave
        question = body["messages"][0]["content"][1]["text"]
        return server.completion(f" {picture_in(body)[1].astype(int).sum()} {question}\n")

    server.reply = reply
    questions = [f"question {index}" for index in range(6)]
    answers = ChatVLM(server.url, vlm_model="llava", concurrency=6).describe(pictures, questions)
    assert answers == [f"{picture.int().sum()} question {i}" for i, picture in enumerate(pictures)]


@pytest.mark.parametrize("source", ["argument", "environment"])
def test_key_is_a_bearer_token(server, pictures, source, monkeypatch):
    if source == "environment":
        monkeypatch.setenv(API_KEY, SECRET)
    ask(server, pictures[:1], **({"api_key": SECRET} if source == "argument" else {}))
    assert server.requests[0]["headers"]["Authorization"] == f"Bearer {SECRET}"


def test_key_that_no_header_can_carry_is_refused(server):
    with pytest.raises(ValueError, match=f"the key, api_key or {API_KEY}, holds a character") as refused:
        ChatVLM(server.url, api_key=f"{SECRET}\n")
    assert SECRET not in str(refused.value) and not server.listings


def test_model_is_the_first_that_the_server_lists(server, pictures):
    ask(server, pictures[:2], vlm_model=None)
    assert {request["body"]["model"] for request in server.requests} == {"first"} and server.listings == 1


def test_url_without_a_path_means_v1(server, pictures):
    assert ask(server.url.removesuffix("/v1") + "/", pictures[:1]) == ["a cat"]


# --- how much at once ---


def test_as_many_requests_at_once_as_allowed_and_no_more(server, pictures):
    together = threading.Barrier(3)  # passes only if three requests are there at the same time

    def reply(number, body):
        together.wait(timeout=20)
        return server.completion("a cat")

    server.reply = reply
    assert ask(server, pictures, concurrency=3) == ["a cat"] * 6
    assert server.most_in_flight == 3


def test_two_batches_at_once_share_the_limit(server, pictures):
    def reply(number, body):
        time.sleep(0.05)  # time for others to come, if they may
        return server.completion("a cat")

    server.reply = reply
    vlm = ChatVLM(server.url, vlm_model="llava", concurrency=2)
    found = []
    threads = [threading.Thread(target=lambda: found.append(vlm.describe(pictures, [QUESTION] * 6))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert found == [["a cat"] * 6] * 2
    assert server.most_in_flight == 2


# --- what goes wrong and passes ---


def fail(server, times, failure):
    """Let the first `times` requests get `failure`, and the others an answer."""
    server.reply = lambda number, body: failure if number < times else server.completion("a cat")


@pytest.mark.parametrize(
    "failure",
    [
        (500, {}, b"out of memory"),
        (503, {}, b""),
        (429, {}, b'{"error": {"message": "slow down"}}'),
        (200, {}, b"<html>a proxy's page</html>"),
        (200, {}, b'{"choices": []}'),
        (200, {}, b'{"choices": [{"message": {"content": null}}]}'),
        (200, {}, b"\xff\xfe"),
        None,
    ],
    ids=["500", "503", "429", "html", "no-choice", "no-text", "no-utf8", "closed"],
)
def test_passing_failures_are_tried_again(server, pictures, failure):
    fail(server, 4, failure)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ask(server, pictures[:2], retries=4) == ["a cat"] * 2
    assert len(server.requests) == 6


def test_retry_after_is_kept_to(server, pictures):
    came = []

    def reply(number, body):
        came.append(time.monotonic())
        return server.completion("a cat") if number else (429, {"Retry-After": "0.4"}, b"")

    server.reply = reply
    assert ask(server, pictures[:1]) == ["a cat"]
    assert came[1] - came[0] >= 0.4


def test_server_that_wants_hours_is_given_up(server, pictures):
    fail(server, 99, (429, {"Retry-After": "7200"}, b"quota"))
    with pytest.raises(VLMError, match="429 .*quota"):
        ask(server, pictures[:1])
    assert len(server.requests) == 1


def test_silent_server_is_left_after_the_timeout(server, pictures):
    silence = threading.Event()
    server.reply = lambda number, body: silence.wait(30) and None
    with pytest.raises(VLMError, match=r"none of 1 pictures; the last error: no answer within timeout=0\.2 s"):
        ask(server, pictures[:1], timeout=0.2, retries=1)
    silence.set()
    assert len(server.requests) == 2


def test_no_picture_is_lost_to_a_server_that_comes_back(server, start_server, pictures):
    server.close()
    tried = threading.Event()

    class Counting(ChatVLM):
        def _pause(self, state):
            tried.set()
            return super()._pause(state)

    vlm = Counting(server.url, vlm_model="llava", backoff=0.05, retries=12)
    answers = []
    asking = threading.Thread(target=lambda: answers.extend(vlm.describe(pictures, [QUESTION] * 6)))
    asking.start()
    assert tried.wait(timeout=20)  # nothing was there
    start_server(server.port)
    asking.join(timeout=30)
    assert answers == ["a cat"] * 6


def test_cancelled_batch_ends_at_once(server, pictures):
    silence, together = threading.Event(), threading.Barrier(3)

    def reply(number, body):
        together.wait(timeout=20)
        silence.wait(60)

    server.reply = reply
    vlm = ChatVLM(server.url, vlm_model="llava", concurrency=2)
    errors = []

    def ask_in_thread():
        try:
            vlm.describe(pictures, [QUESTION] * 6)
        except VLMError as error:
            errors.append(str(error))

    thread = threading.Thread(target=ask_in_thread)
    thread.start()
    together.wait(timeout=20)  # both requests are under way, and stay so
    vlm.cancel()
    thread.join(timeout=20)
    assert errors == [f"vlm={server.url!r}: cancelled"]
    server.reply = lambda number, body: server.completion("a cat")
    assert vlm.describe(pictures, [QUESTION] * 6) == ["a cat"] * 6  # it can be asked again
    silence.set()


# --- what goes wrong for good ---


def test_one_lost_picture_is_none_with_one_warning(server, pictures):
    lost = pictures[2].numpy()

    def reply(number, body):
        bad = np.array_equal(picture_in(body)[1], lost)
        return (500, {}, b"too bright") if bad else server.completion("a cat")

    server.reply = reply
    with pytest.warns(UserWarning, match=r"did not describe 1 of 6 pictures.*HTTP 500.*too bright") as caught:
        assert ask(server, pictures, retries=2) == ["a cat", "a cat", None, "a cat", "a cat", "a cat"]
    assert len(caught) == 1
    assert len(server.requests) == 5 + 3


def test_nothing_described_is_an_error_that_names_the_url(server, pictures):
    fail(server, 999, (500, {}, b'{"detail": "CUDA error"}'))
    with pytest.raises(VLMError, match=f"vlm='{server.url}' described none of 6 pictures; .*HTTP 500.*: CUDA error"):
        ask(server, pictures, retries=1)
    assert len(server.requests) == 12


def test_dead_server_is_named(dead_url, pictures):
    with pytest.raises(VLMError, match=f"vlm='{dead_url}' described none of 2 pictures.*Connection refused"):
        ask(dead_url, pictures[:2], retries=1)


def test_dead_server_is_found_at_once_where_its_models_are_asked_for(dead_url):
    with pytest.raises(VLMError, match=f"vlm='{dead_url}' does not answer .*vllm serve"):
        ChatVLM(dead_url)


def test_server_without_a_model_is_named(server):
    server.models = []
    with pytest.raises(VLMError, match="lists no model.*vlm_model='NAME'"):
        ChatVLM(server.url)


@pytest.mark.parametrize(
    ("status", "key", "message"),
    [
        (401, None, f"wants an API key; set {API_KEY}"),
        (401, SECRET, "API key was refused"),
        (403, SECRET, "API key was refused"),
        (404, None, "vlm_model='llava' was refused .*no such model"),
    ],
)
def test_refusal_ends_all_requests_at_once(server, pictures, status, key, message):
    fail(server, 999, (status, {}, b'{"error": {"message": "no such model"}}'))
    with pytest.raises(VLMError, match=message) as caught:
        ask(server, pictures, api_key=key, concurrency=1)
    assert server.url in str(caught.value) and SECRET not in str(caught.value)
    assert len(server.requests) <= 2  # the one under way when the first is refused


def test_bad_request_is_not_repeated(server, pictures):
    fail(server, 999, (400, {}, b'{"message": "image too large"}'))
    with pytest.raises(VLMError, match="HTTP 400.*image too large"):
        ask(server, pictures[:2])
    assert len(server.requests) == 2


def test_redirect_is_not_followed_with_the_key(server, start_server, pictures):
    other = start_server()
    fail(server, 999, (302, {"Location": f"{other.url}/models"}, b""))
    with pytest.raises(VLMError, match="HTTP 302"):
        ask(server, pictures[:1], api_key=SECRET)
    assert not other.listings and not other.requests


# --- options ---


@pytest.mark.parametrize(
    "options",
    [{"concurrency": 0}, {"timeout": 0}, {"retries": -1}, {"max_tokens": 0}, {"image_format": "gif"}, {"backoff": -1}],
)
def test_option_out_of_range_is_named(options, server):
    [(name, value)] = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        ChatVLM(server.url, **options)
    assert not server.listings


def test_option_of_the_other_kind_is_refused_with_a_hint(server):
    with pytest.raises(TypeError, match="'concurency' is unknown; did you mean 'concurrency'"):
        make_vlm(server.url, concurency=2)
    with pytest.raises(TypeError, match="'batch_size' is unknown"):
        make_vlm(server.url, batch_size=2)
    with pytest.raises(TypeError, match="'concurrency' is unknown"):
        make_vlm("llava-hf/llava-1.5-7b-hf", concurrency=2)


def test_training_without_the_server_ends_in_one_line(dead_url, tmp_path, capsys):
    arguments = ["train", "--env", "DiffusionDenoise-v0", "--env.model", "Shapes", "--out", str(tmp_path / "run")]
    arguments += ["--env.reward", "PromptAlignment", "--env.prompts", "counting"]
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--env.reward-kwargs", "vlm", dead_url, "mode", "count"])
    assert stopped.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: vlm='{dead_url}' does not answer")
