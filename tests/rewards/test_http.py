"""What a server may say of when to come back."""

import email.utils
import time

import pytest

from diffusion_gym.rewards.http import RequestFailed, request_json


def retry_after(server, header):
    server.reply = lambda number, body: (503, {"Retry-After": header}, b"")
    with pytest.raises(RequestFailed) as caught:
        request_json(f"{server.url}/chat/completions", {})
    assert caught.value.status == 503 and caught.value.passing
    return caught.value.retry_after


def test_retry_after_in_seconds(server):
    assert retry_after(server, "12") == 12
    assert retry_after(server, "-5") == 0


def test_retry_after_as_a_date(server):
    assert 50 < retry_after(server, email.utils.formatdate(time.time() + 60, usegmt=True)) <= 60
    assert retry_after(server, email.utils.formatdate(time.time() - 60, usegmt=True)) == 0


@pytest.mark.parametrize("header", ["soon", "", "nan", "inf"])
def test_retry_after_of_another_kind_is_left_alone(server, header):
    assert retry_after(server, header) is None


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(server, monkeypatch, host):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    assert request_json(f"http://{host}:{server.port}/v1/models")["data"]
    with pytest.raises(RequestFailed, match="ConnectError"):  # it is asked for others
        request_json(f"http://example.invalid:{server.port}/v1/models")


def test_no_cookie_and_no_password_of_another_place_is_sent(server, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    server.reply = lambda number, body: (200, {"Set-Cookie": "who=me; Path=/"}, b"{}")
    for _ in range(2):
        request_json(f"{server.url}/chat/completions", {})
    for request in server.requests:
        assert not {"cookie", "authorization"} & {name.lower() for name in request["headers"]}


def test_an_answer_without_end_is_left(server):
    server.reply = lambda number, body: (200, {}, b'"' + b"a" * 2**25 + b'"')
    with pytest.raises(RequestFailed, match="the answer is longer than 16777216 bytes"):
        request_json(f"{server.url}/chat/completions", {})


@pytest.mark.parametrize("url", ["http://", "http://host:port", "http://[::1", "gopher://host", "http://a b"])
def test_what_is_no_address_fails_as_a_request(url):
    with pytest.raises(RequestFailed):
        request_json(url)
