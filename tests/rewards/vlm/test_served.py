"""`transformers serve` with a tiny random LLaVA: a real server of the protocol, in a process of its own."""

import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch

from diffusion_gym.rewards import evaluate, make_reward
from diffusion_gym.rewards.vlm import ChatVLM, LocalVLM
from diffusion_gym.testing.random_vlm import random_prompt_alignment

pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
pytest.importorskip("openai")
pytestmark = pytest.mark.slow

START_SECONDS = 180


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return random_prompt_alignment(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def served(tiny, tmp_path_factory):
    """The base URL of the server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "from transformers.cli.transformers import main; main()"
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    log = (tmp_path_factory.mktemp("server") / "log.txt").open("w+")
    process = subprocess.Popen(
        [sys.executable, "-c", code, "serve", tiny["vlm"], *options],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=log,
        stderr=log,
    )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not ready(port):
            assert process.poll() is None and time.monotonic() < deadline, log.seek(0) or log.read()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()
        log.close()


def ready(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


def test_served_model_answers_like_the_one_in_process(served, tiny, pictures):
    questions = ["what is happening in this image?", "what is this?", "how many cat are there?"] * 2
    here = LocalVLM(tiny["vlm"], max_tokens=5).describe(pictures, questions)
    there = ChatVLM(served, vlm_model=tiny["vlm"], max_tokens=5, concurrency=3).describe(pictures, questions)
    assert there == here and len(set(here)) > 2


def test_reward_is_the_same_by_server_and_in_process(served, tiny):
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    prompts = ["a cat riding a bike", "a dog playing chess"] * 2
    by_server = make_reward("PromptAlignment", **{**tiny, "vlm": served}, vlm_model=tiny["vlm"])
    here = make_reward("PromptAlignment", **tiny)
    assert by_server.background and not here.background
    assert torch.equal(evaluate(by_server, images, prompts).scores, evaluate(here, images, prompts).scores)
