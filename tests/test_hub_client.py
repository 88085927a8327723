"""The real client of the hub, against a small server on this machine that speaks the hub's protocol."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest
import torch

from diffusion_gym.agents.cli import main
from diffusion_gym.models import load_model
from diffusion_gym.testing.random_ddpm import write_random_ddpm

ID, COMMIT = "owner/tiny-ddpm", "a" * 40


class Hub(BaseHTTPRequestHandler):
    """Serves `server.folder` as the one repository."""

    def log_message(self, *args):
        pass

    def answer(self, body, headers=(), status=200):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path, folder = unquote(urlsplit(self.path).path), self.server.folder
        self.server.asked.append((self.command, path))
        files = {str(each.relative_to(folder)): each for each in sorted(folder.rglob("*")) if each.is_file()}
        if path.startswith(f"/{ID}/resolve/"):
            name = path.split("/", 5)[5]
            body = files[name].read_bytes()
            tag = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "none"}
            return self.answer(body, tag)
        if path.startswith(f"/api/models/{ID}/tree/"):
            rows = [{"type": "file", "path": n, "size": f.stat().st_size, "oid": "0" * 40} for n, f in files.items()]
            return self.answer(json.dumps(rows).encode(), {"Content-Type": "application/json"})
        if path.startswith(f"/api/models/{ID}"):
            siblings = [{"rfilename": name, "size": file.stat().st_size} for name, file in files.items()]
            value = {"id": ID, "sha": COMMIT, "siblings": siblings}
            return self.answer(json.dumps(value).encode(), {"Content-Type": "application/json"})
        return self.answer(b"{}", {"X-Error-Code": "RepoNotFound"}, 404)

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one flat DDPM, and an empty cache; `hub.folder` are its files, `hub.asked` the requests."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.asked = write_random_ddpm(tmp_path / "repository", flat=True), []
    (server.folder / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    (server.folder / "README.md").write_text("a card")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint, constants = f"http://127.0.0.1:{server.server_port}", huggingface_hub.constants
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


def test_download_fills_the_cache_and_the_model_then_loads_offline(hub, monkeypatch, capsys):
    main(["download", ID])
    before, after = capsys.readouterr().out.splitlines()
    folder = after.removeprefix(f"{ID}: ")
    assert before.startswith(f"{ID}: 4 files, ") and folder.endswith(COMMIT)
    assert not [path for method, path in hub.asked if path.endswith((".bin", ".md"))]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    model = load_model(ID, "cpu", "float32")
    written = load_model(str(hub.folder), "cpu", "float32")
    assert type(model).__name__ == "PixelModel" and model.name == ID and not hub.asked
    for name, tensor in written.unet.state_dict().items():
        assert torch.equal(model.unet.state_dict()[name], tensor)


def test_model_is_fetched_where_it_is_first_asked_for(hub):
    model = load_model(ID, "cpu", "bfloat16")
    assert model.latent_shape == (3, 8, 8)
    assert not [path for method, path in hub.asked if path.endswith(".bin")]


def test_repository_that_is_not_there_is_reported(hub, capsys):
    with pytest.raises(SystemExit):
        main(["download", "owner/other"])
    assert "(RepositoryNotFoundError: 404" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="RepositoryNotFoundError: 404"):
        load_model("owner/other", "cpu", "float32")
