"""Clients that send slowly, badly, too much or nothing, and rewards that hang: everybody else is still served."""

import base64
import contextlib
import io
import json
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from diffusion_gym.rewards import RewardError, RewardOutput
from diffusion_gym.rewards.remote import RemoteReward
from diffusion_gym.rewards.server import app as server_app
from diffusion_gym.rewards.server.app import make_app

MAX_CONNECTIONS, CLIENT_SECONDS = 8, 1.0


@pytest.fixture(scope="module")
def server(start_server):
    return start_server(
        *("--max-connections", MAX_CONNECTIONS, "--client-seconds", CLIENT_SECONDS, "--reward-seconds", 3)
    )


@pytest.fixture(scope="module")
def locked(start_server):
    """One with a token, and room for many connections."""
    return start_server("--client-seconds", 5, token="secret")


def body(prompt="a"):
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 51, dtype=np.uint8)).save(buffer, "PNG")
    return json.dumps({"images": [base64.b64encode(buffer.getvalue()).decode()], "prompts": [prompt]}).encode()


def ask(server, path="/score", data=None, **headers):
    """Status and JSON."""
    request = urllib.request.Request(server.url + path, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def wait_for(server, **state):
    """Until /health says so."""
    deadline = time.monotonic() + 60
    while not state.items() <= ask(server, "/health")[1].items():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def connect(server, text=""):
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.sendall(text.encode())
    return connection


def head(length, *more):
    return "\r\n".join(
        [
            "POST /score HTTP/1.1",
            "Host: x",
            "Content-Type: application/json",
            f"Content-Length: {length}",
            *more,
            "",
            "",
        ]
    )


def until_closed(connection, drip=b""):
    """What the server says before it closes, and after how many seconds; `drip` is sent again and again meanwhile."""
    begin, said = time.monotonic(), b""
    connection.settimeout(0.1)
    while time.monotonic() < begin + 30:
        try:
            connection.sendall(drip)
            part = connection.recv(4096)
        except TimeoutError:
            continue
        except OSError:
            break
        if not part:
            break
        said += part
    return said, time.monotonic() - begin


def is_closed(connection):
    connection.settimeout(0.01)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


# --- time ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "POST /score HTTP/1.1\r\nHost: x\r\n", "GET /health HTTP/1.1\r\nHost: x\r\n\r\n"])
@pytest.mark.parametrize("drip", [b"", b"x"])
def test_a_client_without_a_request_is_closed(server, text, drip):
    """Also after an answer, and also where a byte comes now and then."""
    _, seconds = until_closed(connect(server, text), drip)
    assert seconds < 10 * CLIENT_SECONDS


def test_a_slow_body_ends_and_holds_no_place(server):
    connection = connect(server, head(100_000))
    found = []
    thread = threading.Thread(target=lambda: found.append(until_closed(connection, b"x")))
    thread.start()
    status, answer = ask(server, data=body())
    assert status == 200 and answer["scores"] == [pytest.approx(0.2)]
    assert ask(server, "/health")[1]["held"] == 0
    thread.join(60)
    said, seconds = found[0]
    assert b" 408 " in said and b"client_seconds=1" in said and seconds < 10 * CLIENT_SECONDS


def test_without_the_token_a_slow_body_ends(locked):
    said, seconds = until_closed(connect(locked, head(100_000, "Connection: close")), b"x")
    assert b" 401 " in said and seconds < 20


@pytest.mark.parametrize("token", ["secret", "wrong"])
def test_a_refusal_reaches_a_client_that_still_sends(locked, token):
    """If it were closed at once, the client would see a broken connection, and try again for all its patience."""
    status, _ = ask(locked, data=b"[" * 20_000_000, Authorization=f"Bearer {token}")
    assert status == {"secret": 422, "wrong": 401}[token]


@pytest.mark.slow
def test_a_client_that_reads_no_answers_is_closed(server):
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = server.url.removeprefix("http://").split(":")
        connection.connect((host, int(port)))
        connection.settimeout(1)
        with pytest.raises(ConnectionError):
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                with contextlib.suppress(TimeoutError):
                    connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 1000)


# --- number ----------------------------------------------------------------------------------------------------


def test_idle_connections_turn_nobody_away(server):
    idle = [connect(server) for _ in range(3 * MAX_CONNECTIONS)]
    assert ask(server, "/health")[0] == 200
    assert ask(server, data=body())[0] == 200
    closed = [is_closed(connection) for connection in idle]
    assert all(closed[: 2 * MAX_CONNECTIONS])  # the oldest ones


def test_a_request_that_has_arrived_is_not_closed_for_another(server):
    with ThreadPoolExecutor() as pool:
        first = pool.submit(ask, server, data=body("hold kept"))
        server.wait_until_at("kept")
        idle = [connect(server) for _ in range(2 * MAX_CONNECTIONS)]
        assert ask(server, "/health")[0] == 200
        (server.folder / "kept").touch()
        assert first.result()[0] == 200
    assert is_closed(idle[0])


def test_the_log_is_short(server):
    before = (server.folder / "stderr").stat().st_size
    for _ in range(200):
        said, _ = until_closed(connect(server, "no HTTP\r\n\r\n"))
        assert b" 400 " in said
    written = (server.folder / "stderr").read_text()[before:]
    assert 0 < written.count("\n") <= 25


# --- the reward ------------------------------------------------------------------------------------------------


def test_a_reward_that_hangs_is_told_to_all_and_ends_no_run(server):
    with ThreadPoolExecutor() as pool:
        hanging = pool.submit(ask, server, data=body("hold hung"))
        server.wait_until_at("hung")
        waiting = pool.submit(ask, server, data=body())
        begin = time.monotonic()
        for future in (hanging, waiting):
            status, answer = future.result()
            assert (
                status == 503 and "has not returned for" in answer["detail"] and "reward_seconds=3" in answer["detail"]
            )
        assert time.monotonic() - begin < 30
        status, health = ask(server, "/health")
        assert status == 503 and health["ready"] is False and health["held"] == health["waiting"] == 0
        assert ask(server, data=body())[0] == 503
        with pytest.raises(RewardError, match="503.*has not returned for"):
            RemoteReward(server.url)
        (server.folder / "hung").touch()
        wait_for(server, ready=True)
    assert ask(server, data=body())[0] == 200


def test_a_client_that_leaves_gives_its_place_and_memory_back(server):
    sent = body()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(ask, server, data=body("hold left"))
        server.wait_until_at("left")
        alone = ask(server, "/health")[1]["memory"]
        assert 8 * 8 * 3 < alone < 1000
        leaving = connect(server, head(len(sent)) + sent.decode())
        wait_for(server, held=2, waiting=1)
        assert ask(server, "/health")[1]["memory"] > alone + 8 * 8 * 3
        leaving.close()
        wait_for(server, held=1, waiting=0, memory=alone)
        (server.folder / "left").touch()
        assert first.result()[0] == 200
    wait_for(server, held=0, memory=0)


def test_texts_count_as_memory(server):
    with ThreadPoolExecutor() as pool:
        first = pool.submit(ask, server, data=body("hold text"))
        server.wait_until_at("text")
        long = pool.submit(ask, server, data=body("é" * 100_000))
        wait_for(server, waiting=1)
        assert ask(server, "/health")[1]["memory"] >= 400_000
        (server.folder / "text").touch()
        assert first.result()[0] == long.result()[0] == 200


def test_half_a_character_is_refused(server):
    status, answer = ask(server, data=body("open \ud800"))
    assert status == 400 and "half of a character" in answer["detail"]


def test_errors_name_no_folder_of_the_server(server):
    path = server.folder / "nowhere" / "a file.bin"
    status, answer = ask(server, data=body(f"open {path}"))
    assert status == 500 and "No such file or directory: 'a file.bin'" in answer["detail"]
    assert not any(str(part) in answer["detail"] for part in list(path.parents)[:-1])
    assert str(path) in (server.folder / "stderr").read_text()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("at /srv/me/x.py:3, /usr/lib/y.so", "at x.py:3, y.so"),
        (r"C:\Users\me\x.py is no 'D:\my models\y.bin'", "x.py is no 'y.bin'"),
        ("'/srv/a'", "'a'"),
        ("no http://host:8000/a/b, 1/2 or and/or", "no http://host:8000/a/b, 1/2 or and/or"),
    ],
)
def test_paths_become_files(text, expected):
    assert server_app._without_paths(text) == expected


# --- failures of the server's own ------------------------------------------------------------------------------


def call(app, data):
    """The status and JSON of one request within this process."""
    import asyncio

    sent = []

    async def main():
        messages = [{"type": "http.request", "body": data}]

        async def receive():
            return messages.pop() if messages else await asyncio.Event().wait()

        async def send(message):
            sent.append(message)

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/score", "headers": headers, "query_string": b""}
        async with app.router.lifespan_context(app):
            await asyncio.wait_for(app(scope, receive, send), 30)

    asyncio.run(main())
    return sent[0]["status"], json.loads(sent[1]["body"])


def brightness(images, prompts, metadata):
    return RewardOutput(images.mean((1, 2, 3)))


@pytest.mark.parametrize("error", [MemoryError(), KeyError("ours"), OSError(28, "No space left on device", "/a/b")])
@pytest.mark.parametrize("place", ["read_request", "write_output"])
def test_only_the_rewards_own_error_is_500(monkeypatch, caplog, error, place):
    """All else passes, maybe: the client tries again and its run goes on."""

    def fail(*_):
        raise error

    app = make_app(brightness)
    monkeypatch.setattr(server_app, place, fail)
    status, answer = call(app, body())
    assert status == 503 and re.fullmatch(rf"the server failed \({type(error).__name__}\); .*log.*", answer["detail"])
    assert type(error).__name__ in caplog.text


@pytest.mark.slow
def test_a_request_that_the_end_of_the_server_cuts_off_is_503(start_server):
    server = start_server()
    with ThreadPoolExecutor() as pool:
        cut = pool.submit(ask, server, data=body("hold for ever"))
        server.wait_until_at("for ever")
        server.process.terminate()
        assert cut.result()[0] == 503
    server.wait()
