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
