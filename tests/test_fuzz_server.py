"""Anything that a client can send to a reward server: it is scored, or refused with a sentence."""

import base64
import io
import json
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffusion_gym.rewards import RewardOutput
from diffusion_gym.rewards.server.app import make_app
from diffusion_gym.rewards.server.limits import Limits
from fuzzing import JSON, TEXT, bounded, changed, damaged, no_hang

TOKEN = "a long secret"
MOST = 50_000
HEADER_TEXT = st.sampled_from(["", "application/json", "text/plain", "*/*", "a/b; charset=x", "9" * 100, "-1", "x"])


def brightness(images, prompts, metadata):
    return RewardOutput(images.mean((1, 2, 3)))


@pytest.fixture(scope="module")
def client():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the version of httpx
        from starlette.testclient import TestClient

    limits = Limits(max_batch=3, max_bytes=MOST, max_memory=16 * MOST)
    with TestClient(make_app(brightness, token=TOKEN, limits=limits)) as client:
        yield client


def png(size=(8, 8), mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def text(data):
    return base64.b64encode(data).decode()


PICTURES = [png(), png((1, 1)), png((9, 7), "L"), png(mode="RGBA"), png(mode="P")]
REQUEST = {"images": [text(png())] * 2, "prompts": ["a", "b"], "metadata": [{}, {"weight": 1}]}
AS_MEANT = {"content-type": "application/json", "authorization": f"Bearer {TOKEN}"}


def check(answer):
    """Scores, or a refusal that says why."""
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400 and answer.request.method != "HEAD":
        assert len(answer.text) > 8 and len(answer.text) < 3_000 and "Traceback" not in answer.text
    if answer.status_code == 200 and answer.request.url.path == "/score":
        sent = json.loads(answer.request.content)["images"]
        assert answer.json()["scores"] == pytest.approx([mean_of(picture) for picture in sent], abs=1e-5)


def mean_of(picture):
    """What `brightness` gives for a picture of a request."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture)))).mean() / 255


@bounded(40)
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "BREW"]),
    path=st.sampled_from(["/score", "/health", "/", "/score/", "//score", "/../score", "/%00", "/score?a=b", "/é"]),
    names=st.dictionaries(
        st.sampled_from(["content-type", "authorization", "content-length", "accept", "host", "expect", "range"]),
        HEADER_TEXT.map(lambda value: value.encode()) | st.just(AS_MEANT["authorization"].encode()),
        max_size=3,
    ),
    body=st.binary(max_size=50) | st.just(json.dumps(REQUEST).encode()),
)
def test_any_request(client, method, path, names, body):
    with no_hang():
        check(client.request(method, path, headers={**AS_MEANT, **names}, content=body))


@bounded(60)
@given(change=changed(REQUEST) | JSON, bytes_=damaged(json.dumps(REQUEST).encode()), bad=st.integers(0, 4))
def test_any_body(client, change, bytes_, bad):
    body = json.dumps(change).encode() if bad else bytes_
    with no_hang():
        check(client.post("/score", content=body, headers=AS_MEANT))


@bounded(50)
@given(
    picture=st.sampled_from([png(), png((1, 1)), png((9, 7), "L"), png((8, 8), "RGBA"), png((8, 8), "P")]).flatmap(
        damaged
    ),
    encoded=st.sampled_from([text, lambda data: text(data)[:-1], lambda data: data.decode("latin-1")]),
    prompt=TEXT,
)
def test_any_picture(client, picture, encoded, prompt):
    body = json.dumps({"images": [encoded(picture)], "prompts": [prompt]}).encode()
    with no_hang():
        check(client.post("/score", content=body, headers=AS_MEANT))


@pytest.mark.parametrize("number", [MOST - 100, MOST, MOST + 1, 4 * MOST])
def test_any_size(client, number):
    for content in (
        b" " * number,
        b"[" * number,
        b'{"images": ["' + b"A" * number,
        iter([b" " * 1000] * (number // 1000)),
    ):
        with no_hang():
            check(client.post("/score", content=content, headers=AS_MEANT))
    check(client.post("/score", content=json.dumps(REQUEST).encode(), headers=AS_MEANT))
