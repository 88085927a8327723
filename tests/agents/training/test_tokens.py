"""Tokens of the environment go only to addresses that the user names."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from diffusion_gym.agents.training.runs import load_settings
from diffusion_gym.agents.training.settings import RunSettings, make_env
from diffusion_gym.rewards import make_reward
from run_folders import made_here


class _Server(BaseHTTPRequestHandler):
    seen: list[str | None] = []

    def do_GET(self):
        self.seen.append(self.headers.get("Authorization"))
        body = json.dumps({"name": "Color", "max_batch": 8, "max_bytes": 10**6, "data": [{"id": "a"}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    """The address of a reward server, and the `Authorization` headers that it has got."""
    with HTTPServer(("127.0.0.1", 0), _Server) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        _Server.seen.clear()
        yield f"http://127.0.0.1:{served.server_port}", _Server.seen
        served.shutdown()


@pytest.mark.parametrize("form", ["{}", "{}=1,Count=0"])
def test_a_token_goes_only_where_the_user_says(form, server, tmp_path, monkeypatch):
    url, seen = server
    monkeypatch.setenv("DIFFUSION_GYM_REWARD_TOKEN", "secret")
    folder = made_here(tmp_path / "mine", reward=form.format(url))
    make_env(load_settings(folder), 1)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "another machine"))
    settings = load_settings(folder, trust=True)
    with pytest.warns(UserWarning, match=f"DIFFUSION_GYM_REWARD_TOKEN is not sent to '{url}'.*--token-to {url}"):
        make_env(settings, 1)
    for allowed in ((url,), ("http://127.0.0.1:1", url + "/")):
        make_env(RunSettings(**{**vars(settings), "token_to": allowed}), 1)
    make_reward(url)  # what Python code names is the user's own
    assert seen == ["Bearer secret", None, *3 * ["Bearer secret"]]
    with pytest.raises(ValueError, match="token_to='judge' must be an address"):
        make_env(RunSettings(**{**vars(settings), "token_to": ("judge",)}), 1)


def test_the_key_of_a_vlm_stays_too(server, monkeypatch):
    from diffusion_gym.rewards.tokens import tokens_only_to
    from diffusion_gym.rewards.vlm import make_vlm

    url, seen = server
    monkeypatch.setenv("DIFFUSION_GYM_VLM_API_KEY", "secret")
    with tokens_only_to([]), pytest.warns(UserWarning, match="VLM_API_KEY is not sent"):
        make_vlm(url)
    make_vlm(url)
    assert seen == [None, "Bearer secret"]
