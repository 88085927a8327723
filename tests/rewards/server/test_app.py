"""The reward server over HTTP, as a client in any language sees it: JSON and PNG, made here without our client."""

import base64
import http.client
import io
import json
import re
import struct
import threading
import time
import urllib.error
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_gym.images import to_uint8
from diffusion_gym.rewards import REWARDS, RewardOutput
from diffusion_gym.rewards.server.app import make_app, serve
from diffusion_gym.rewards.server.limits import Limits
from diffusion_gym.rewards.server.wire import Answer, BadRequest, encode_images, read_request, write_output
from diffusion_gym.schemas import checked

TOKEN = "a long secret"
LIMITS = {"max_batch": 8, "max_queue": 4, "max_bytes": 100_000}


@pytest.fixture(scope="module")
def server(start_server):
    options = [part for name, value in LIMITS.items() for part in ("--" + name.replace("_", "-"), value)]
    return start_server(*options, token=TOKEN)


@pytest.fixture
def ask(server):
    """`ask(path, body, token)`: status, decoded JSON and headers; bytes are sent as they are."""

    def send(path, body=None, token=TOKEN):
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        request = urllib.request.Request(server.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer), answer.headers
        except urllib.error.HTTPError as error:
            return error.code, json.load(error), error.headers

    return send


def picture(seed, size=(8, 8)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def png(array, mode=None, format="PNG"):
    buffer = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(buffer, format)
    return base64.b64encode(buffer.getvalue()).decode()


def request(*prompts, size=(8, 8), **more):
    return {"images": [png(picture(index, size)) for index in range(len(prompts))], "prompts": prompts, **more}


def wait_for(ask, **state):
    """Until /health says so."""
    deadline = time.monotonic() + 60
    while not state.items() <= ask("/health")[1].items():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- what it answers -------------------------------------------------------------------------------------------


def test_health_tells_name_and_limits_to_all(ask):
    status, found, _ = ask("/health", token=None)
    assert status == 200
    assert found["name"] == "steered" and found["ready"] is True and found["authorized"] is False
    assert {name: found[name] for name in LIMITS} == LIMITS
    assert ask("/health")[1]["authorized"] is True


def test_scores_are_those_of_the_pictures(ask):
    status, found, _ = ask("/score", request("a", "b", "c", metadata=[{"weight": 1}, {}, {"weight": 2.5}]))
    assert status == 200
    expected = [float(picture(index).mean() / 255) for index in range(3)]
    np.testing.assert_allclose(found["scores"], expected, rtol=1e-6)
    assert found["info"] == {"batch": [3, 3, 3], "weight": [1, 0, 2.5]}


def test_what_is_not_finite_is_null(ask):
    scores = ask("/score", request("nan", "a", "inf"))[1]["scores"]
    assert [score is None for score in scores] == [True, False, True]


def test_a_reward_that_raises_says_why(ask, server):
    status, found, _ = ask("/score", request("raise"))
    assert status == 500
    told, _, place = found["detail"].partition(" (")
    assert told == "reward='steered' raised ValueError: this prompt is not to be scored"
    line = '    raise ValueError("this prompt is not to be scored")'
    number = 1 + next(n for n, text in enumerate((server.folder / "served.py").read_text().split("\n")) if line in text)
    assert place == f"served.py:{number})"
    logged = (server.folder / "stderr").read_text()  # with the traceback
    assert f'served.py", line {number}, in steered' in logged and line.strip() in logged
    assert ask("/score", request("a"))[0] == 200


# --- what it refuses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [None, "", "wrong", TOKEN + "x"])
def test_without_the_token_nothing_is_scored(ask, token):
    status, found, _ = ask("/score", request("a"), token)
    assert status == 401 and "DIFFUSION_GYM_REWARD_TOKEN" in found["detail"]


def header(width, height, bits=8):
    return struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)


def raw_png(width=8, bits=8, more=()):
    """A black PNG by hand, with more chunks after its first."""
    pixels = zlib.compress(bytes(8 * (1 + 3 * width * bits // 8)))
    data = b"\x89PNG\r\n\x1a\n"
    for name, content in [(b"IHDR", header(width, 8, bits)), *more, (b"IDAT", pixels), (b"IEND", b"")]:
        data += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return base64.b64encode(data).decode()


GOOD = png(picture(0))
GARBAGE = {
    "no json": (b"\x80\x04pickle", 400, "not JSON"),
    "nothing": (b"", 400, "not JSON"),
    "deep": (b"[" * 90_000, 400, "not JSON"),
    "a list": (b"[1]", 422, r"the body: \[1\]: input should be an object.*; docs/reward-server.md shows a"),
    "no images": ({"prompts": ["a"]}, 422, "the field 'images' is missing"),
    "empty": ({"images": [], "prompts": []}, 422, r"images=\[\]: list should have at least 1 item"),
    "no prompts": ({"images": [GOOD]}, 422, "the field 'prompts' is missing"),
    "wrong prompts": ({"images": [GOOD], "prompts": [1]}, 422, "prompts.0=1: input should be a valid string"),
    "wrong metadata": (
        {"images": [GOOD], "prompts": ["a"], "metadata": [1]},
        422,
        "metadata.0=1: input should be an object",
    ),
    "unknown": ({"images": [GOOD], "prompts": ["a"], "seed": 1}, 422, "the field 'seed' is not known here"),
    "counts": ({"images": [GOOD], "prompts": ["a", "b"]}, 422, "1 images, 2 prompts and 2 metadata"),
    "too many": (request(*"abcdefghi"), 422, "9 images exceed max_batch=8"),
    "no base64": ({"images": ["***"], "prompts": ["a"]}, 422, r"images\[0\] is not base64"),
    "no png": ({"images": [base64.b64encode(b"GIF89a").decode()], "prompts": ["a"]}, 422, r"images\[0\] is no PNG"),
    "a jpeg": ({"images": [png(picture(0), format="JPEG")], "prompts": ["a"]}, 422, "is no PNG"),
    "half a png": (
        {"images": [png(picture(1, (64, 64))), png(picture(2, (64, 64)))[:4000]], "prompts": ["a", "b"]},
        422,
        r"images\[1\] is no intact PNG",
    ),
    "with alpha": ({"images": [png(picture(0), "RGBA")], "prompts": ["a"]}, 422, "mode RGBA; convert it to 8-bit RGB"),
    "16 bits": (
        {"images": [raw_png(bits=16)], "prompts": ["a"]},
        422,
        "16-bit PNG of mode RGB; convert it to 8-bit RGB",
    ),
    "gray": ({"images": [png(picture(0), "L")], "prompts": ["a"]}, 422, "mode L; convert it to 8-bit RGB"),
    "two headers": ({"images": [raw_png(more=[(b"IHDR", header(9, 9))])], "prompts": ["a"]}, 422, "no intact PNG"),
    "a transparent color": ({"images": [raw_png(more=[(b"tRNS", b"\0" * 6)])], "prompts": ["a"]}, 422, "a transparent"),
    "animated": ({"images": [raw_png(more=[(b"acTL", b"\0" * 8)])], "prompts": ["a"]}, 422, "holds an animation"),
    "many chunks": (
        {"images": [raw_png(more=[(b"prVt", b"")] * 5000)], "prompts": ["a"]},
        422,
        "more than 4096 chunks",
    ),
    "no pixels": ({"images": [raw_png(width=0)], "prompts": ["a"]}, 422, "does not begin with its size"),
    "no end": ({"images": [GOOD[:44]], "prompts": ["a"]}, 422, "no intact PNG"),
    "other letters": ({"images": ["é" * 60], "prompts": ["a"]}, 422, "is not base64"),
    "two sizes": ({"images": [GOOD, png(picture(0, (8, 16)))], "prompts": ["a", "b"]}, 422, "one size"),
    "a bomb": (
        {"images": [png(np.zeros((3000, 3000, 3), np.uint8))], "prompts": ["a"]},
        422,
        "3000 x 3000 pixels",
    ),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_refused_in_words(ask, name):
    body, status, words = GARBAGE[name]
    got, found, _ = ask("/score", body)
    assert got == status and re.search(words, found["detail"])
    assert ask("/health")[1]["held"] == 0


def test_what_a_png_holds_beside_its_pixels_is_left_unread(ask):
    """A private chunk, and a text that would unpack to 64 MB."""
    text = b"k\0\0" + zlib.compress(bytes(2**26))
    status, found, _ = ask("/score", {"images": [raw_png(more=[(b"prVt", b"x"), (b"zTXt", text)])], "prompts": ["a"]})
    assert status == 200 and found["scores"] == [0.0]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_what_a_web_page_can_post_is_refused(server, kind):
    """A page of another site may send these without asking; for JSON a browser asks first, and gets a 405."""
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": kind}
    with pytest.raises(urllib.error.HTTPError, match="415") as refused:
        data = json.dumps(request("a")).encode()
        urllib.request.urlopen(urllib.request.Request(server.url + "/score", data, headers), timeout=60)
    assert "application/json" in json.load(refused.value)["detail"]
    with pytest.raises(urllib.error.HTTPError, match="405"):
        urllib.request.urlopen(urllib.request.Request(server.url + "/score", method="OPTIONS"), timeout=60)


def test_a_body_over_the_limit_is_refused(ask):
    status, found, _ = ask("/score", b"x" * (LIMITS["max_bytes"] + 1))
    assert status == 413 and "max_bytes=100000" in found["detail"]


def test_a_body_over_the_limit_without_its_length_is_refused(server):
    """Chunked transfer: nothing says beforehand how long it will be."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    chunks = (b"x" * 10_000 for _ in range(11))
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    connection.request("POST", "/score", chunks, headers, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


@pytest.mark.parametrize("path", ["/", "/docs", "/score/../../etc/passwd"])
def test_there_is_nothing_else(server, path):
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(server.url + path, timeout=60)


# --- several clients -------------------------------------------------------------------------------------------


def test_waiting_requests_are_merged_and_a_full_queue_is_refused(ask, server):
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(ask, "/score", request("hold first"))
        server.wait_until_at("first")
        same = [pool.submit(ask, "/score", request(*prompts)) for prompts in ("abc", "d")]
        wait_for(ask, waiting=2)
        other = pool.submit(ask, "/score", request("e", size=(16, 16)))
        wait_for(ask, waiting=3, held=4)
        status, found, headers = ask("/score", request("f"))
        assert status == 503 and int(headers["Retry-After"]) >= 1 and "max_queue=4" in found["detail"]
        (server.folder / "first").touch()
        assert first.result()[1]["info"]["batch"] == [1]
        assert [future.result()[1]["info"]["batch"] for future in same] == [[4, 4, 4], [4]]
        assert other.result()[1]["info"]["batch"] == [1]  # another size cannot be in one batch with them
        expected = [float(picture(index).mean() / 255) for index in range(3)]
        np.testing.assert_allclose(same[0].result()[1]["scores"], expected, rtol=1e-6)
    assert ask("/score", request("f"))[0] == 200


def test_one_request_spoils_no_other(ask, server):
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(ask, "/score", request("hold second"))
        server.wait_until_at("second")
        bad, good = pool.submit(ask, "/score", request("raise")), pool.submit(ask, "/score", request("a"))
        wait_for(ask, waiting=2)
        (server.folder / "second").touch()
        assert [future.result()[0] for future in (first, bad, good)] == [200, 500, 200]


# --- beginning to serve ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::"])
def test_other_machines_need_a_token(host):
    with pytest.raises(ValueError, match=f"host='{host}' lets other machines in; give a token"):
        serve(REWARDS["Compressibility"](), host=host, port=0)


def test_a_taken_port_is_named(server):
    port = int(server.url.rsplit(":", 1)[1])
    with pytest.raises(OSError, match=f"port={port} cannot be served .*; choose another --port"):
        serve(REWARDS["Compressibility"](), host="127.0.0.1", port=port)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
@pytest.mark.parametrize("name", vars(Limits()))
def test_limits_are_checked(name, value):
    with pytest.raises(ValueError, match=f"{name}={value} must be at least .* and finite"):
        Limits(**{name: value})


def test_memory_has_room_for_several_requests():
    with pytest.raises(ValueError, match=r"max_memory=100 must be at least 16 \* max_bytes=800"):
        Limits(max_bytes=50, max_memory=100)


@pytest.mark.parametrize("port", [-1, 65536, 70000])
def test_a_port_that_is_none_is_refused(port):
    with pytest.raises(ValueError, match=f"port={port} must be 1 to 65535, or 0 for a free one"):
        serve(REWARDS["Compressibility"](), host="127.0.0.1", port=port)


@pytest.mark.parametrize(
    ("token", "words"), [("", "is empty"), (" ", "cannot carry"), ("a\nb", "cannot carry"), ("é", "cannot")]
)
def test_a_token_that_protects_nothing_is_refused(token, words):
    with pytest.raises(ValueError, match=words):
        serve(REWARDS["Compressibility"](), host="127.0.0.1", port=0, token=token)
    with pytest.raises(ValueError, match=words):
        make_app(REWARDS["Compressibility"](), token=token)


# --- the wire --------------------------------------------------------------------------------------------------


def test_pictures_travel_without_loss():
    images = torch.rand(3, 3, 24, 16, generator=torch.Generator().manual_seed(0))
    texts = encode_images(images)
    for text, expected in zip(texts, to_uint8(images).numpy(), strict=True):
        decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
        np.testing.assert_array_equal(decoded, expected)
    body = json.dumps({"images": texts, "prompts": ["a", "b", "c"]}).encode()
    assert torch.equal(read_request(body, 8).unpack(), to_uint8(images))


@pytest.mark.parametrize("body", [b"[" + b"[]," * 2**17 + b"0]", b'{"a":' * 2**17, b"[" * 2**18])
def test_a_body_that_would_grow_in_memory_is_refused_unread(body):
    with pytest.raises(BadRequest, match="more than 131072 commas, colons and brackets"):
        read_request(body, 8)


def test_numbers_travel_without_loss():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 1e-7
    sent = json.loads(json.dumps(write_output(RewardOutput(values, {"part": values**3}))))
    found = checked(Answer, sent, "", "").output(1000, torch.device("cpu"))
    assert torch.equal(found.scores, values) and torch.equal(found.info["part"], values**3)


def test_a_large_wrong_body_is_refused_in_a_short_sentence():
    body = json.dumps({"images": ["x"] * 9, "prompts": [1] * 100_000}).encode()
    with pytest.raises(BadRequest, match="^the body: prompts.0=1: input should be a valid string; docs") as refused:
        read_request(body, 8)
    assert len(str(refused.value)) < 120
    body = json.dumps({"images": ["x"], "prompts": "p" * 10**6}).encode()
    with pytest.raises(BadRequest, match="prompts='ppp") as refused:
        read_request(body, 8)
    assert len(str(refused.value)) < 200


def test_the_server_ends_on_a_signal(start_server):
    """With a request under way: it is answered first."""
    server = start_server()
    found = []

    def score():
        data = json.dumps(request("hold late")).encode()
        asked = urllib.request.Request(server.url + "/score", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=60) as answer:
            found.append(answer.status)

    thread = threading.Thread(target=score)
    thread.start()
    server.wait_until_at("late")
    server.process.terminate()
    (server.folder / "late").touch()
    thread.join(60)
    server.wait()
    assert found == [200]
