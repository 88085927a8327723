"""How much memory a server takes at its peak, with as much sent to it as it lets in and more."""

import base64
import io
import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MIB = 2**20
MAX_MEMORY = 128 * MIB
SIDE = 1024  # 3 MiB a picture; two of them are most of the sixteenth that one request may unpack to

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")


@pytest.fixture(scope="module")
def server(start_server):
    options = ["--max-memory", MAX_MEMORY, "--max-bytes", MAX_MEMORY // 16, "--max-queue", 64]
    return start_server(*options, fresh=True)


def picture(noise):
    """A PNG in base64: of a few kB, or of nearly the 3 MiB that it unpacks to."""
    pixels = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    if noise:
        pixels[:] = np.random.default_rng(0).integers(0, 256, pixels.shape)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def ask(server, images, prompt="a"):
    """Status and JSON."""
    data = json.dumps({"images": images, "prompts": [prompt] * len(images)}, ensure_ascii=False).encode()
    request = urllib.request.Request(server.url + "/score", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def peak(server):
    """Bytes that the process has had at most."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def test_a_small_request_of_large_pictures_is_refused_before_it_is_unpacked(server):
    ask(server, [picture(noise=False)])
    before = peak(server)
    status, answer = ask(server, [picture(noise=False)] * 64)
    assert status == 413 and f"unpack to {64 * 3 * SIDE**2} bytes, max_unpacked={8 * MIB}" in answer["detail"]
    assert peak(server) - before < 8 * MIB


@pytest.mark.slow
def test_the_peak_is_at_most_three_times_what_the_requests_may_hold(server):
    """Large and small bodies at once, the former in a text that Python holds at 4 bytes a character."""
    ask(server, [picture(noise=False)])
    before = peak(server)
    small, large = [picture(noise=False)] * 2, [picture(noise=True)]
    with ThreadPoolExecutor(48) as pool:
        first = pool.submit(ask, server, small, "hold door")
        server.wait_until_at("door")
        waiting = [pool.submit(ask, server, *sent) for sent in 20 * [(small,), (large, "😀")]]
        held = [future.result() for future in waiting if future.done()]
        while len(held) < 6:  # the memory is full, and these were turned away
            held = [future.result() for future in waiting if future.done()]
        (server.folder / "door").touch()
        found = [future.result()[0] for future in [first, *waiting]]
    assert set(found) == {200, 503} and found.count(200) > 10
    rise = peak(server) - before
    print(f"\npeak: {rise / MAX_MEMORY:.2f} times max_memory={MAX_MEMORY // MIB} MiB")
    assert 0.5 * MAX_MEMORY < rise <= 3 * MAX_MEMORY
    health = json.load(urllib.request.urlopen(server.url + "/health", timeout=60))
    assert health["memory"] == health["held"] == 0
